"""What matching takes beside the arithmetic that it cannot do without.

    python -m benchmarks.matching --check       blocks of Pythia-1.4B's width, two rounds of weight matching

A round needs, for each block of width d with f FFN units, products of 12 d³ + 4 d² f + 2 d f² multiply-adds: b's
matrices turned by the stream's map, every pair of heads and every pair of units compared, and what the block, so moved,
says about the stream. Then come singular values of head maps and of the stream's map, and assignments. CPU time of one
thread, taken inside the run. `products done : needed` says how many more products were computed, and `everything :
products` is the time of all over that of the products: what is neither of these is casts, sums, copies. The stream's
singular values are found once a round, so that few blocks make them look dear: of 24 they have a third of that share.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import scipy.optimize
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import RESULTS, Row, options, provenance, write_csv, write_json
from benchmarks.synthetic import SHAPES, Planted, config_of
from lmc_fast.architectures import FAMILIES
from lmc_fast.checkpoints import LazyBlocks, Weights
from lmc_fast.matching.balance import balanced
from lmc_fast.matching.closed_form import Evidence, match

SOURCES = ("lmc_fast/matching", "lmc_fast/symmetry", "lmc_fast/solvers", "benchmarks/matching.py")
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "addr", "ger", "dot"}
PROMISED = 2.0
ROUNDS = 2


class Spent(TorchDispatchMode):
    """CPU seconds inside products, and inside decompositions."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        began = time.process_time()
        out = func(*args, **(kwargs or {}))
        if name in PRODUCTS:
            self.seconds["products"] += time.process_time() - began
        elif name.startswith("_linalg") or name.startswith("linalg"):
            self.seconds["decompositions"] += time.process_time() - began
        return out


@contextmanager
def timed_assignments(seconds: Counter[str]) -> Iterator[None]:
    """Adds what scipy takes; it is looked up when it is called."""
    whole: Callable[..., Any] = scipy.optimize.linear_sum_assignment

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        out = whole(*args, **kwargs)
        seconds["assignments"] += time.thread_time() - began
        return out

    scipy.optimize.linear_sum_assignment = timed
    try:
        yield
    finally:
        scipy.optimize.linear_sum_assignment = whole


def endpoints(width: int, layers: int) -> tuple[Weights, Weights]:
    """A pair of Pythia-1.4B's head size, balanced, in memory, with a small vocabulary: its table is not what counts."""
    shape = SHAPES["pythia-1.4b"]._replace(width=width, layers=layers, heads=width // 128, vocab=512)
    spec = FAMILIES["gpt_neox"].spec(config_of(shape))
    planted = Planted(spec)

    def weights(moved: bool) -> Weights:
        blocks = [planted.block(i, moved) for i in range(layers)]
        return balanced(Weights(spec, planted.ends(moved), LazyBlocks(layers, blocks.__getitem__)))[1]

    return weights(False), weights(True)


def measure(width: int, layers: int) -> list[Row]:
    a, b = endpoints(width, layers)
    # balanced weights are balanced whenever they are read; that is no part of matching
    a, b = (
        Weights(w.spec, w.ends, LazyBlocks(layers, [w.blocks[i] for i in range(layers)].__getitem__)) for w in (a, b)
    )
    match(a, b, Evidence(1, 0), rounds=1)
    counted = FlopCounterMode(display=False)
    spent = Spent()
    with spent, timed_assignments(spent.seconds):
        began = time.process_time()
        match(a, b, Evidence(1, 0), rounds=ROUNDS)
        everything = time.process_time() - began
    with counted:
        match(a, b, Evidence(1, 0), rounds=ROUNDS)
    d, f = a.spec.width, a.spec.ffn.width
    needed = 2 * (12 * d**3 + 4 * d * d * f + 2 * d * f * f) * layers * ROUNDS
    ratio = everything / spent.seconds["products"]
    case = f"width {width}, {layers} blocks, {ROUNDS} rounds"
    rows = [
        {"case": case, "what": what, "value": round(seconds, 3), "unit": "s"} for what, seconds in spent.seconds.items()
    ]
    done = counted.get_total_flops()
    rows += [
        {"case": case, "what": "everything", "value": round(everything, 3), "unit": "s"},
        {"case": case, "what": "products done : needed", "value": round(done / needed, 3), "unit": ""},
        {
            "case": case,
            "what": "rate of products",
            "value": round(done / spent.seconds["products"] / 1e9, 1),
            "unit": "GFlop/s",
        },
        {
            "case": case,
            "what": "everything : products",
            "value": round(ratio, 3),
            "unit": "",
            "promised": f"<= {PROMISED:g}",
            "ok": ratio <= PROMISED,
        },
    ]
    return rows


def main(argv: list[str] | None = None) -> int:
    parser: argparse.ArgumentParser = options(__doc__)
    parser.add_argument("--width", type=int, nargs="+", help="default: 2048")
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for width in args.width or ([256] if args.quick else [2048]):
        for row in measure(width, args.layers):
            print(f"{row['case']:36} {row['what']:28} {row['value']} {row['unit']}", flush=True)
            rows.append(row | provenance(*SOURCES))
    if args.json:
        write_json(args.json, rows)
    elif not args.quick:
        write_csv(RESULTS / "matching.csv", rows)
    return int(args.check and any(row.get("ok") is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
