"""What a frontend is told of the service levels that `serve` was given."""

from __future__ import annotations

import math
from pathlib import Path

from penstock.cli.frontend import service_options
from penstock.cli.frontends import service_flags
from penstock.config import ServiceSettings, Tenant


def test_what_serve_was_told_reaches_its_frontend() -> None:
    given = ServiceSettings(ttft_slo=2.0, ttft_patience=1.5, max_queued=7, affinity_s=0.5, tenants=Path("/tenants"))
    flags = service_flags(given)
    assert ServiceSettings(**{flag.replace("-", "_"): value for flag, value in flags.items()}) == given  # type: ignore[arg-type]
    assert "ttft-slo" not in service_flags(ServiceSettings())


def test_levels_of_a_router() -> None:
    options = service_options(ServiceSettings(ttft_slo=2.0, max_queued=7), {"acme": Tenant(weight=3.0)})
    assert (options.level.ttft_s, options.level.max_queued, options.level.weights) == (2.0, 7, {"acme": 3.0})
    assert service_options(ServiceSettings(), {}).level.ttft_s == math.inf
