"""What is measured, and what is read from the system."""

import pytest
import torch

from lmc_fast.budget import meter as meter_module
from lmc_fast.budget.meter import (
    FIRST_USE,
    LIBRARIES,
    Meter,
    available_memory,
    budget_warning,
    cgroup_room,
    counted_bytes,
    libraries_to_come,
    peak_bytes,
    reset_peak,
    resident_bytes,
    return_freed_memory,
)

BIG = 96 << 20


def test_the_peak_of_each_stage():
    meter = Meter()
    with meter.stage("idle"):
        pass
    with meter.stage("busy"):
        torch.ones(BIG, dtype=torch.uint8)
    with pytest.raises(ZeroDivisionError), meter.stage("broken"):
        raise ZeroDivisionError
    idle, busy, _ = meter.stages
    assert busy.peak_rss - idle.peak_rss > 0.9 * BIG
    rows = meter.to_json()["stages"]
    assert [row["name"] for row in rows] == ["idle", "busy", "broken"]
    assert all(row["seconds"] >= 0 and row["peak_rss"] > 0 and row["peak_device"] is None for row in rows)
    if not idle.since_start:
        assert meter.stages[2].peak_rss < busy.peak_rss - BIG / 2


def test_what_counts_towards_a_budget(monkeypatch, tmp_path):
    assert counted_bytes("cuda") == 0
    assert resident_bytes() <= counted_bytes("cpu") <= resident_bytes() + 2 * FIRST_USE + LIBRARIES
    monkeypatch.setattr(meter_module, "PROC", tmp_path)
    assert libraries_to_come() == 0  # nobody knows
    (tmp_path / "self").mkdir()
    for files, more in ((LIBRARIES, 0), (LIBRARIES // 2, LIBRARIES // 2), (2 * LIBRARIES, 0)):
        (tmp_path / "self/status").write_text(f"VmRSS:\t{1 << 19} kB\nRssFile:\t{files >> 10} kB\n")
        assert libraries_to_come() == more


def test_where_the_peak_cannot_be_reset(monkeypatch, tmp_path):
    monkeypatch.setattr(meter_module, "PROC", tmp_path)
    assert not reset_peak() and peak_bytes() > 1 << 20 and resident_bytes() > 1 << 20
    meter = Meter()
    with meter.stage("x"):
        pass
    assert meter.stages[0].since_start and meter.stages[0].peak_rss > 0
    assert cgroup_room() is None


@pytest.mark.parametrize(
    ("line", "root", "files"),
    [
        ("0::/job/step", "", ("memory.max", "memory.current")),
        ("4:memory:/job/step", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("4:cpu,memory:/job/step", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_limits_of_control_groups(line, root, files, monkeypatch, tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(f"9:cpu:/other\n{line}\n")
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    8000 kB\n")
    own = groups / root / "job" / "step"
    own.mkdir(parents=True)
    monkeypatch.setattr(meter_module, "PROC", proc)
    monkeypatch.setattr(meter_module, "CGROUP", groups)
    assert cgroup_room() is None and available_memory() == 8000 * 1024
    for directory, limit, use in (
        (own, "max", "5"),
        (own.parent, "5000000", "1000000"),
        (groups / root, str(1 << 62), "7"),
    ):
        (directory / files[0]).write_text(limit)
        (directory / files[1]).write_text(use)
    assert cgroup_room() == available_memory() == 4_000_000  # the one above binds
    (own / files[0]).write_text("3")
    assert cgroup_room() == 0


def test_a_budget_that_is_not_there():
    assert budget_warning(1 << 20) is None
    warning = budget_warning(1 << 50)
    assert "budget of 1,024 TiB is more than" in warning and warning.count(".") <= 3


def test_freed_memory_goes_back():
    return_freed_memory()
    pieces = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(24)]
    held = resident_bytes()
    del pieces
    assert resident_bytes() < held - BIG / 2
