"""lmc-fast env: what a bug report needs to know of the machine and of what is installed on it."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

from ..budget.meter import available_memory, cgroup_room
from ..implementations import backends
from ..sizes import show_bytes
from ..version import __version__
from .console import Console

SETTINGS = ("LMC_FAST_", "OMP_", "MKL_", "TRITON_", "CUDA_VISIBLE", "PYTORCH_", "HF_HUB_OFFLINE", "HF_HOME")
"""Environment variables that change what runs begin with one of these; none of them holds a secret."""
OPTIONAL = ("triton", "peft", "mergekit", "fusion-bench")  # not required, but often part of what went wrong


def env_command(args: argparse.Namespace, console: Console) -> int:
    found = environment()
    for name, value in found.items():
        if isinstance(value, dict):
            console.say(f"{name}:" if value else f"{name}: none")
            for key, inner in value.items():
                console.say(f"  {key}: {_shown(key, inner)}")
        else:
            console.say(f"{name}: {value}")
    console.result(found)
    return 0


def environment() -> dict[str, Any]:
    """Versions, active implementations, processor, memory in bytes, GPUs and settings."""
    return {
        "lmc_fast": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _packages()},
        "backends": asdict(backends()),
        "processor": {"name": _processor(), "cores": _cores(), "torch threads": torch.get_num_threads()},
        "memory": {"available": available_memory(), "control group leaves": cgroup_room()},
        "gpus": {f"cuda:{i}": _gpu(i) for i in range(torch.cuda.device_count())},
        "cuda of torch": torch.version.cuda or "none",
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
    }


def _shown(key: str, value: Any) -> str:
    if key in ("available", "control group leaves"):
        return "no limit" if value is None else show_bytes(value)
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else f"{value}"


def _packages() -> list[str]:
    try:
        lines = requires("lmc-fast") or []
    except PackageNotFoundError:  # a checkout that was not installed
        lines = ["torch", "transformers", "safetensors", "huggingface_hub", "numpy", "scipy", "matplotlib", "tqdm"]
    needed = [re.split(r"[\s;<>=!~\[]", line)[0] for line in lines if "extra ==" not in line]
    return [*needed, "tokenizers", *OPTIONAL]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, compute capability {found.major}.{found.minor}, {show_bytes(found.total_memory)}"
