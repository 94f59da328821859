"""The Triton kernels compiled for two GPUs, which need not be there. Run by test_triton.py in a process of its own."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmc_fast.solvers import cayley_triton, expm_triton
from lmc_fast.solvers.triton_matrices import DEPTH, options

KERNELS = {
    "cayley-forward": (cayley_triton.forward_kernel, "B", {}),
    "cayley-backward": (cayley_triton.backward_kernel, "B", {}),
    "expm-forward": (expm_triton.forward_kernel, "K", {"keep_tape": True}),
    "expm-forward-no-tape": (expm_triton.forward_kernel, "K", {"keep_tape": False}),
    "expm-backward": (expm_triton.backward_kernel, "K", {}),
}
INTEGERS = ("refused", "plans", "overflow")  # int32 tensors; every other tensor is float32
OLD_COMPILER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_for(capability: int, kernel, constants: dict, launch: dict):
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("n", "slots"):
            signature[name] = "i32"
        else:
            signature[name] = "*i32" if name in INTEGERS else "*fp32"
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


def resources(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    assert usage is not None, done.stdout + done.stderr
    return dict(zip(("registers", "stack", "local"), map(int, usage.groups()), strict=True))


@pytest.mark.skipif(OLD_COMPILER, reason="triton before 3.7 spills 8 bytes of one kernel")
@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("N", (16, 32, 64))
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_spills(name, N, capability):
    kernel, block, constants = KERNELS[name]
    launch = options(N, forward="forward" in name)
    compiled = compile_for(capability, kernel, constants | {"N": N, block: DEPTH}, launch)
    used = resources(compiled)
    assert used["stack"] == 0 and used["local"] == 0, used
    assert used["registers"] <= 128
    assert compiled.metadata.shared <= 16 * 1024  # blocks that share a multiprocessor are bound by registers alone
    ptx = compiled.asm["ptx"]
    assert "ld.global.nc" not in ptx, "a load past the coherent cache would miss what the program wrote"
    assert "mma" not in ptx and "tf32" not in ptx, "products are in full float32"
    assert "bar.sync" in ptx


def test_the_gate_sees_spills():
    kernel, block, _ = KERNELS["cayley-forward"]
    used = resources(compile_for(90, kernel, {"N": 128, block: DEPTH}, {"num_warps": 16, "maxnreg": 128}))
    assert used["stack"] > 0, "128 x 128 fits now: raise TRITON_LARGEST"
