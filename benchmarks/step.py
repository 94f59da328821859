"""What a step of learning costs, beside an ordinary training step of one model.

Time (process time, one thread, variants interleaved, medians) and peak memory above the weights, on CPU, for a GPT-NeoX
of four blocks and that family's real vocabulary. All learn on cross-entropy:

    floor            ordinary training step of one model: forward, backward, gradients of all weights
    reference        both endpoints transformed whole and interpolated, through autograd
    reference-gauge  the same with the relative transform on one endpoint
    fused, concat, weight (+ recompute)   ours by one route: graphs kept, or blocks computed again in backward
    ours (+ recompute)                    ours, route by kernels.dispatch
    one-sided                             ours, for one endpoint's transform alone

    python -m benchmarks.step
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPTNeoXConfig

from benchmarks.common import RESULTS, Row, interleave, options, provenance, read_csv, write_csv, write_json
from benchmarks.floor import task_loss
from lmc_fast.architectures import FAMILIES, Spec
from lmc_fast.checkpoints import Weights, lerp
from lmc_fast.engine.passes import Item
from lmc_fast.engine.source import Resident, paired
from lmc_fast.kernels.dispatch import choose
from lmc_fast.learning.step import learn
from lmc_fast.symmetry import canonicalize
from lmc_fast.symmetry.charts import Chart

LAYERS, VOCABULARY, SEQUENCE, LAMBDA = 4, 50304, 256, 0.45
SOURCES = ("lmc_fast/engine", "lmc_fast/learning", "lmc_fast/kernels", "lmc_fast/symmetry", "benchmarks")


def spec_of(width: int) -> Spec:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=SEQUENCE,
        use_parallel_residual=True,
    )
    return FAMILIES["gpt_neox"].spec(config)


def random_weights(spec: Spec, seed: int) -> Weights:
    """Random matrices at a trained model's scale, in canonical form."""
    generator = torch.Generator().manual_seed(seed)

    def slot(name: str) -> Tensor:
        shape = spec.shape(name)
        assert shape is not None
        if "norm" in name or len(shape) == 1:
            return torch.full(shape, 1.0 if name.endswith("norm") else 0.0)
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    names = spec.shapes
    ends = {n: slot(n) for n in names if n in ("embed", "head") or n.startswith("final_norm")}
    block = [n for n in names if n not in ends]
    return canonicalize(Weights(spec, ends, [{n: slot(n) for n in block} for _ in range(spec.layers)]))


QUICK = ("floor", "reference", "fused", "weight", "ours", "ours + recompute", "one-sided")
LARGE = ("floor", "reference-gauge", "ours", "ours + recompute", "one-sided")
QUICKEST = ("floor", "ours", "ours + recompute")  # for many tokens


def variants(width: int, tokens: Tensor) -> dict[str, Callable[[], object]]:
    spec = spec_of(width)
    a, b = random_weights(spec, 1), random_weights(spec, 2)
    source = Resident(*paired(a, b))
    a, b = source.members
    generator = torch.Generator().manual_seed(3)
    charts = {}
    for sides in (1, 2):
        charts[sides] = Chart(spec, sides)
        for t in charts[sides].tensors.values():
            t.data.copy_(0.02 * torch.randn(t.shape, generator=generator))
    chart = charts[2]

    def floor() -> None:
        model = a.map(lambda t: t.detach().requires_grad_())
        leaves = [*model.ends.values(), *(t for block in model.blocks for t in block.values())]
        torch.autograd.grad(task_loss(model, tokens), leaves, allow_unused=True)

    def reference(gauge: bool) -> None:
        if gauge:
            line = lerp(a, chart.relative().apply(b), LAMBDA)
        else:
            left, right = chart.elements()
            line = lerp(left.apply(a), right.apply(b), LAMBDA)
        torch.autograd.grad(task_loss(line, tokens), list(chart.tensors.values()))

    def ours(route: str | None, keep: bool, sides: int = 2) -> Callable[[], object]:
        return lambda: learn(source, [Item(tokens, LAMBDA)], charts[sides], divergence=False, keep=keep, route=route)

    made: dict[str, Callable[[], object]] = {
        "floor": floor,
        "reference": lambda: reference(False),
        "reference-gauge": lambda: reference(True),
    }
    for name, route in (("fused", "fused"), ("concat", "concat"), ("weight", "weight"), ("ours", None)):
        made[name] = ours(route, True)
        made[f"{name} + recompute"] = ours(route, False)
    made["one-sided"] = ours(None, True, 1)
    return made


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that the allocator had handed out at once during a call, above what was there before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    live = most = 0
    assert trace.profiler is not None
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def measure(width: int, count: int, repeats: int, only: tuple[str, ...] = ()) -> list[Row]:
    sequence = min(count, SEQUENCE)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(VOCABULARY, (count // sequence, sequence + 1), generator=generator)
    calls = {name: call for name, call in variants(width, tokens).items() if not only or name in only}
    picked = {keep: choose(count, width, torch.float32, torch.device("cpu"), keep).route for keep in (True, False)}
    memory = {name: peak_bytes(call) for name, call in calls.items()}
    times = interleave(calls, repeats, time.process_time, warm_up=False)  # the memory run was one
    floor = statistics.median(times["floor"])
    return [
        {
            "d": width,
            "tokens": count,
            "variant": name,
            "picked": picked["recompute" not in name] if name.startswith(("ours", "one")) else "",
            "ms": round(statistics.median(some), 2),
            "per floor": round(statistics.median(some) / floor, 3),
            "peak MiB": round(memory[name] / 2**20, 1),
            "per reference": round(memory[name] / memory["reference"], 3) if "reference" in memory else "",
        }
        for name, some in times.items()
    ]


def misses(rows: list[Row]) -> list[str]:
    """Promised figures that these rows miss, as far as they were measured."""
    out = []
    for d, count in sorted({(r["d"], r["tokens"]) for r in rows}):
        at = {r["variant"]: r for r in rows if (r["d"], r["tokens"]) == (d, count)}
        ms = {name: r["ms"] for name, r in at.items()}

        def need(ok: bool, text: str, d: int = d, count: int = count) -> None:
            if not ok:
                out.append(f"d {d}, {count} tokens: {text}")

        for suffix in ("", " + recompute"):
            routes = {p: ms[p + suffix] for p in ("fused", "concat", "weight") if p + suffix in ms}
            # the same computation twice: their difference is noise
            dispatched = min(ms["ours" + suffix], routes.get(at["ours" + suffix]["picked"], math.inf))
            ratio = dispatched / min(routes.values(), default=dispatched)
            need(ratio <= 1.05, f"dispatched{suffix} takes {ratio:.2f}x the best route, promised 1.05")
        if "one-sided" in ms:
            need(ms["ours"] <= 1.1 * ms["one-sided"], f"dual takes {ms['ours'] / ms['one-sided']:.2f}x one-sided")
        if count == 8 * d:
            need(at["ours"]["per floor"] <= 1.35, f"{at['ours']['per floor']}x the floor, promised 1.35")
            ratio = at["ours + recompute"]["per floor"]
            need(ratio <= 1.75, f"{ratio}x the floor with recompute, promised 1.75")
        if count <= d:
            speed = ms["reference"] / ms["ours"]
            need(speed >= 2, f"{speed:.2f}x faster than the materialised reference, promised 2")
            share = at["ours + recompute"]["per reference"]
            need(share <= 0.25, f"{share:.2f} of the reference's memory, promised 0.25")
    return out


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument(
        "--width", type=int, action="append", help="only these widths; rows of others stay in the results"
    )
    parser.add_argument("--tokens", type=int, action="append", help="only steps of so many; other rows stay too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    widths = args.width or ([256] if args.quick else [256, 512, 1024])
    file, origin = RESULTS / "step.csv", provenance(*SOURCES)
    factors = (0.25, 1, 8) if args.quick else (0.25, 1, 2, 8)
    cases = [(width, int(f * width)) for width in widths for f in factors]
    cases = [case for case in cases if not args.tokens or case[1] in args.tokens]
    others = [row for row in read_csv(file) if (int(row["d"]), int(row["tokens"])) not in cases]
    rows: list[Row] = []
    for width, count in cases:
        work, many = width * count, count > width
        if args.quick:
            some = measure(width, count, repeats=1 if many else 2, only=QUICKEST if many else QUICK)
        else:
            only = LARGE if work > 2**22 else ()
            turns = 11 if work <= 2**18 else 5 if work <= 2**20 else 2  # short steps vary by 5 %
            some = measure(width, count, turns, only)
        for r in some:
            print(
                f"d {r['d']:5} T {r['tokens']:6}  {r['variant']:20} {r['picked']:7} {r['ms']:10.1f} ms "
                f"{r['per floor']:7.2f} floor {r['peak MiB']:9.1f} MiB {r['per reference'] or '-':>6} reference"
            )
        rows += [row | origin for row in some]
        if not args.quick:  # after each: all take hours
            write_csv(file, sorted(others + rows, key=lambda row: (int(row["d"]), int(row["tokens"]))))
    if args.json:
        write_json(args.json, rows)
    missed = misses(rows)
    for text in missed:
        print(f"missed: {text}")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
