"""Which way to interpolate linear layers: the cheaper side by a count of operations, measured where that is close.

For a block of 12 d² weights and T tokens, in multiply-adds: on the activations 60 T d² for forward and backward (88
with recompute); on the weights 36 T d² + 36 d³ (48 T d² + 36 d³). So weights win above T = 1.5 d (0.9 d). Within a
factor of CLOSE of that, both are timed once on a layer of the same proportions; the crossover is cached per device.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LmcError
from ..output import write_whole
from .enabled import wanted
from .routes import ROUTES, interpolated, product

COUNTED = {True: 1.5, False: 0.9}  # crossover in tokens per width, by whether graphs are kept
CLOSE = 2.5
BLOCK = 1.4  # a whole block's crossover for that of the layers timed here (1.3 to 1.5 on CPU, benchmarks/step.py)
TURNS, SECONDS = 7, 0.5  # of a measurement, at least; short products need many turns
WIDEST = {"cpu": 1024}  # widths above need no measurement there: large GEMMs run at one speed, and take long
_log = logging.getLogger("lmc_fast")


class Choice(NamedTuple):
    """A route of kernels.routes.ROUTES, and why."""

    route: str
    why: str


def choose(tokens: int, width: int, dtype: torch.dtype, device: torch.device, keep: bool = True) -> Choice:
    """For a block of `width` that serves `tokens` in one visit. keep: graphs are kept, so that nothing is recomputed.

    LMC_FAST_ROUTE overrides. Raises ValueError if that names no route.
    """
    forced = forced_route()
    if forced:
        return Choice(forced, "set by LMC_FAST_ROUTE")
    ratio, counted = tokens / width, COUNTED[keep]
    if counted / CLOSE < ratio < counted * CLOSE and width <= WIDEST.get(device.type, width):
        crossover, how = crossover_of(width, dtype, device, keep), "measured"
    else:
        crossover, how = counted, "counted"
    route = activation_route(width, dtype, device) if ratio < crossover else "weight"
    return Choice(route, f"{ratio:.2f} tokens per width, crossover {how} at {crossover:.2f}")


def forced_route() -> str | None:
    """What LMC_FAST_ROUTE asks for. Raises ValueError if that names no route."""
    forced = os.environ.get("LMC_FAST_ROUTE")
    if forced and forced not in ROUTES:
        raise ValueError(f"LMC_FAST_ROUTE is {forced!r}; it takes one of {', '.join(ROUTES)}")
    return forced


@cache
def crossover_of(width: int, dtype: torch.dtype, device: torch.device, keep: bool) -> float:
    """Tokens per width at which both sides take the same time."""
    key = f"block crossover {'keep' if keep else 'recompute'} {_place(width, dtype, device)}"
    return _cached(key, lambda: measure_crossover(width, dtype, device, keep))


def measure_crossover(width: int, dtype: torch.dtype, device: torch.device, keep: bool) -> float:
    case = _Case(width, dtype, device)
    few, many = width // 2 + 1, 2 * width
    ways = {
        "activations": lambda: case.on_activations(few, keep),
        "weights, few": lambda: case.on_weights(few, keep),
        "weights, many": lambda: case.on_weights(many, keep),
    }
    t = _times(ways, device)
    slope = t["activations"] / few
    weights_slope = (t["weights, many"] - t["weights, few"]) / (many - few)
    fixed = t["weights, few"] - weights_slope * few
    if slope <= weights_slope or fixed <= 0:  # a disturbed measurement says nothing
        return COUNTED[keep]
    found = BLOCK * fixed / (slope - weights_slope) / width
    return min(max(found, COUNTED[keep] / CLOSE), COUNTED[keep] * CLOSE)  # outside, counting decides


@cache
def activation_route(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """The faster of the two paths that work on activations."""
    if device.type == "cpu":
        return "fused"  # a concatenated GEMM measured no faster there (benchmarks/step.py)

    def measure() -> float:
        case = _Case(width, dtype, device)
        ways = {p: partial(case.product, 4 * width, p) for p in ("fused", "concat")}
        t = _times(ways, device)
        return t["concat"] / t["fused"]

    return "concat" if _cached(f"concat/fused {_place(width, dtype, device)}", measure) < 1 else "fused"


class _Case:
    """Three layers' worth of rows behind one rotation, as q, k and v are: what a block is on average."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(0), dtype, device
        both = self._random(3 * width, 2, width)
        self.a, self.b = both[:, 0], both[:, 1]
        self.rotation = (self._random(width, width) * width**-0.5).requires_grad_()

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def _input(self, tokens: int) -> Tensor:
        return self._random(tokens, self.a.shape[1]).requires_grad_()

    def product(self, tokens: int, route: str) -> None:
        x = self._input(tokens)
        y = product(x, self.a, self.b, 0.4, right=self.rotation, route=route)
        torch.autograd.grad(y, [x, self.rotation], y.detach())

    def on_activations(self, tokens: int, keep: bool) -> None:
        if not keep:
            with torch.no_grad():
                product(self._input(tokens), self.a, self.b, 0.4, right=self.rotation, route="fused")
        self.product(tokens, "fused")

    def on_weights(self, tokens: int, keep: bool) -> None:
        if keep:
            return self.product(tokens, "weight")
        x = self._input(tokens)
        with torch.no_grad():
            y = x @ interpolated(self.a, self.b, 0.4, None, self.rotation).mT
        w = interpolated(self.a, self.b, 0.4, None, self.rotation)
        leaf = w.detach().requires_grad_()
        _, dw = torch.autograd.grad(x @ leaf.mT, [x, leaf], y)
        torch.autograd.grad(w, self.rotation, dw)
        return None


def _times(ways: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Seconds of each way at its best: what disturbs a run only ever makes it longer."""
    for way in ways.values():  # warm up
        way()
    best = dict.fromkeys(ways, math.inf)
    turn, end = 0, time.perf_counter() + SECONDS
    while turn < TURNS or time.perf_counter() < end:
        for name, way in ways.items():
            _finish(device)
            start = time.perf_counter()
            way()
            _finish(device)
            best[name] = min(best[name], time.perf_counter() - start)
        turn += 1
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _place(width: int, dtype: torch.dtype, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    kernels = f", kernels {' '.join(wanted(device)) or 'none'}" if device.type == "cuda" else ""
    return f"{name}, {torch.get_num_threads()} threads, {dtype}, torch {torch.__version__}{kernels}, width {width}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lmc_fast" / "dispatch.json"


def _cached(key: str, measure: Callable[[], float]) -> float:
    """The remembered figure of this device, or a new one. A cache that cannot be read or written is done without.

    It is read again behind the measurement: what other processes found meanwhile stays, and theirs is taken.
    """
    known = _remembered()
    if key not in known:
        value = measure()
        known = _remembered()
        if key not in known:
            known[key] = value
            try:
                cache_file().parent.mkdir(parents=True, exist_ok=True)
                write_whole(cache_file(), json.dumps(known, indent=1))
            except (OSError, LmcError):
                _log.info("could not write %s", cache_file())
    return known[key]


def _remembered() -> dict[str, float]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, float)} if isinstance(found, dict) else {}
