"""What is made of NVML's answers, and of its silence."""

from __future__ import annotations

import sys

import pytest

from penstock.topology.nvml import Gpu, find_gpus, read_gpus
from tests.topology.fake_host import FakeNvml, NVMLError

H100 = "NVIDIA H100 80GB HBM3"


def test_figures_and_links() -> None:
    nvml = FakeNvml([("0000:18:00.0", H100, 85_520_809_984, ["0000:05:00.0"] * 4 + ["0000:06:00.0"] * 4 + [None])])
    [gpu] = read_gpus(nvml)
    assert gpu == Gpu("0000:18:00.0", H100, 85_520_809_984, 3.328e12, {"0000:05:00.0": 100e9, "0000:06:00.0": 100e9})


def test_ends_that_are_not_told_are_kept_apart() -> None:
    [gpu] = read_gpus(FakeNvml([("0000:18:00.0", H100, 1, ["", "", "0000:19:00.0"])], nvlink_version=7))
    assert gpu.nvlinks == {"": 100e9, "0000:19:00.0": 50e9}


def test_what_is_not_told_is_unknown() -> None:
    [gpu] = read_gpus(FakeNvml([("0000:18:00.0", "Some GPU", 0, [])]))
    assert (gpu.memory_bytes_per_s, gpu.nvlinks) == (0.0, {})


def test_the_library_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml([("0000:18:00.0", H100, 1, [])])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = find_gpus()
    assert found is not None
    assert [gpu.name for gpu in found] == [H100]
    assert not nvml.is_open


def test_without_a_driver_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDriver(FakeNvml):
        def nvmlInit(self) -> None:
            raise NVMLError

    monkeypatch.setitem(sys.modules, "pynvml", NoDriver([]))
    assert find_gpus() is None


def test_without_the_package_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_gpus() is None
