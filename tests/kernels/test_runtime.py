"""How tiles are timed: with a clock in place of the GPU's."""

import torch

from lmc_fast.kernels import runtime


def test_tiles_are_timed_without_memory(monkeypatch):
    clock = 0.0
    costs = iter([50.0, *[3.0] * 5, *[2.0] * 5, *[4.0] * 5])  # the first launch compiles

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock

        def synchronize(self):
            self.done = True

        def elapsed_time(self, end):
            assert end.done
            return end.at - self.at

    def launch():
        nonlocal clock
        clock += next(costs)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", None)
    assert runtime.milliseconds(launch, (0.5, 0.2, 0.8)) == [2.0] * 3
    assert next(costs, None) is None
