"""What devices fail with, as one sentence."""

import pytest
import torch

from lmc_fast import LmcError
from lmc_fast.budget.devices import device_errors, require_device


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "not enough memory on the device; give --memory"),
        (torch.AcceleratorError("CUDA error: an illegal memory access\nmore"), r"failed \(CUDA error: .*\); what"),
        (MemoryError(), "not enough memory; give"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "not enough memory; give"),
    ],
)
def test_failures_become_sentences(error, words):
    @device_errors()
    def fail():
        raise error

    for _ in range(2):  # a decorator serves every call
        with pytest.raises(LmcError, match=words) as found:
            fail()
        assert "\n" not in str(found.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a bug"), device_errors():
        raise RuntimeError("a bug")


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nonsense", None, [], "cpu:0:1"])
def test_devices_that_are_not_there(device):
    with pytest.raises(LmcError, match="is not usable"):
        require_device(device)
    assert require_device("cpu") == torch.device("cpu")
