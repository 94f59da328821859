"""Compile a kernel for a GPU that is not there, and read what the assembler says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Report(NamedTuple):
    registers: int
    stack: int  # bytes of local memory: spills
    shared: int  # bytes, static and dynamic
    ptx: str


def compiled(kernel, capability: int, arguments: dict, meta: dict, warps: int = 4, stages: int = 3) -> Report:
    """arguments: name -> Triton type ("*bf16", "fp32", "i32", "i32:16" where 16 divides it); meta: constexprs."""
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = arguments.get(name)
        if name in meta or kind is None:
            signature[name] = "constexpr"
            constants[name] = meta.get(name)
        else:
            signature[name] = kind.split(":")[0]
            if kind.startswith("*") or kind.endswith(":16"):
                aligned[(i,)] = [["tt.divisibility", 16]]
    unknown = (set(arguments) | set(meta)) - set(kernel.arg_names)
    assert not unknown, f"{kernel.fn.__name__} has no {unknown}"
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Report(*_resources(binary.asm["cubin"]), binary.metadata.shared, binary.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers for each thread, bytes of stack) of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    assert found, said.stdout + said.stderr
    return int(found[1]), int(found[2])
