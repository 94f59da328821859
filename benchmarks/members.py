"""Many models: what the average of four seeds costs, by every scheme, and what four cost to learn against two.

    python examples/train_pair.py --seeds 4 --jobs 2 --out FAMILY      # trained once, not part of the repository
    python -m benchmarks.members FAMILY [--steps N] [--only SCHEME ...] [--json FILE] [--check]

FAMILY: a directory with a/, b/, c/, d/, train.npy, val.npy, test.npy. All losses are measured by transformers alone, on
exported stock checkpoints, averaged tensor by tensor, on the test tokens. Learning takes as many steps in all: 3 N for
four models, N for each alignment of two. Without FAMILY only the time of a step is measured.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, logging

import lmc_fast as lmc
from benchmarks.common import Row, interleave, options, provenance, write_json
from benchmarks.step import random_weights, spec_of
from lmc_fast.alignment import Alignment
from lmc_fast.engine.passes import Item
from lmc_fast.engine.source import Resident, paired
from lmc_fast.learning.step import learn
from lmc_fast.members import member_names
from lmc_fast.places import centroid, inside
from lmc_fast.symmetry.charts import Chart

BLOCK = 128
MUST = {"hierarchical": 0.12}  # nats of the average of all over the mean of the models' own losses
STEP = 2.2  # times the step of two that one of four may take
INSIDE = 66  # places inside the simplex
SCHEMES = ("naive", "star", "mergemany", "universe", "hierarchical", "joint", "joint from hierarchical")


class Stock:
    """Averages of stock checkpoints, run by transformers."""

    def __init__(self, places: list[Path], tokens: Path, limit: int | None):
        loaded = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for place in places]
        self.model, self.states = loaded[0], [{n: t.clone() for n, t in m.state_dict().items()} for m in loaded]
        ids = torch.from_numpy(np.load(tokens).astype(np.int64))
        self.blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
        self.blocks = self.blocks[:: max(1, len(self.blocks) // limit)][:limit] if limit else self.blocks

    @torch.no_grad()
    def loss(self, shares: tuple[float, ...]) -> float:
        mixed = {n: sum(s * state[n] for s, state in zip(shares, self.states, strict=True)) for n in self.states[0]}
        self.model.load_state_dict(mixed)
        return float(np.mean([self._part(part) for part in self.blocks.split(1)]))

    def _part(self, part: torch.Tensor) -> float:
        out = self.model(input_ids=part).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(out, part[:, 1:].flatten()).item()

    @torch.no_grad()
    def ensemble(self) -> float:
        """Loss of the equal mixture of all models' predictions."""
        total = []
        for state in self.states:
            self.model.load_state_dict(state)
            total.append([self.model(input_ids=part).logits[:, :-1].log_softmax(-1) for part in self.blocks.split(8)])
        losses = []
        for k, part in enumerate(self.blocks.split(8)):
            mixed = torch.logsumexp(torch.stack([each[k] for each in total]), 0) - np.log(len(self.states))
            losses.append(F.nll_loss(mixed.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        return float(sum(losses)) / (len(self.blocks) * (BLOCK - 1))


def measured(places: list[Path], tokens: Path, limit: int | None, whole: bool) -> Row:
    """Excess of the average of all; whole: also of the middle of every edge, and the worst of INSIDE places."""
    stock, count = Stock(places, tokens, limit), len(places)
    ends = [stock.loss(tuple(float(k == i) for k in range(count))) for i in range(count)]

    def excess(shares: tuple[float, ...]) -> float:
        return stock.loss(shares) - sum(s * end for s, end in zip(shares, ends, strict=True))

    found: Row = {"average": round(excess((1 / count,) * count), 4), "losses": [round(end, 4) for end in ends]}
    if whole:
        edges = {}
        for (a, i), (b, j) in combinations(enumerate(member_names(count)), 2):
            line = [tuple((1 - t) * (k == a) + t * (k == b) for k in range(count)) for t in (0.3, 0.5, 0.7)]
            edges[f"{i}-{j}"] = max(excess(place) for place in line)
        found |= {"edges": {name: round(value, 4) for name, value in edges.items()}}
        found |= {"worst_inside": round(max(excess(inside(k, count)) for k in range(INSIDE)), 4)}
        found |= {"ensemble": round(stock.ensemble() - sum(ends) / count, 4)}
    return found


def aligned(scheme: str, family: Path, steps: int, **options: object) -> Alignment | None:
    """steps: of each alignment of two; learning all at once takes as many in all."""
    places = [family / name for name in "abcd"]
    models, train, val = lmc.open_models(places), *(tokens_of(family / f"{n}.npy") for n in ("train", "val"))
    how = {"validation": val[:: max(1, len(val) // 64)], **options}
    if scheme == "star":  # each to the first, which stays
        found = [
            lmc.align(lmc.open_pair(places[0], place), train, method="one-sided", steps=steps, **how)
            for place in places[1:]
        ]
        elements = [found[0].a, *(each.b for each in found)]
        return Alignment(*elements, elements)
    if scheme == "joint from hierarchical":  # half of the steps for either
        levels = {"scheme": "joint", "start": "hierarchical", "steps": max(1, 3 * steps // 6)}
        return lmc.align(models, train, **levels, **how)
    each = {"hierarchical": steps, "joint": 3 * steps}.get(scheme, 1)
    return None if scheme == "naive" else lmc.align(models, train, scheme=scheme, steps=each, **how)


def tokens_of(file: Path) -> torch.Tensor:
    ids = torch.from_numpy(np.load(file).astype(np.int64))
    return ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)


def family_rows(family: Path, steps: int, only: list[str], limit: int | None, **options: object) -> list[Row]:
    models, rows = lmc.open_models([family / name for name in "abcd"]), []
    for scheme in only:
        start = time.perf_counter()
        found = aligned(scheme, family, steps, **options)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as scratch:
            places = [family / name for name in "abcd"]
            if found is not None:
                lmc.export(models, found, Path(scratch) / "out", torch.float32)
                places = [Path(scratch) / "out" / name for name in "abcd"]
            row = measured(places, family / "test.npy", limit, whole=scheme.startswith(("naive", "joint", "hier")))
        rows.append({"case": scheme, "steps": 3 * steps, "seconds": round(seconds, 1)} | row)
        print(rows[-1], flush=True)
    return rows


def step_row(width: int, tokens: int, repeats: int) -> Row:
    """Processor time of a step of two and of four models, as learning takes it: one teacher for each sequence."""
    spec = replace(spec_of(width), vocab=4096)
    weights = [random_weights(spec, seed) for seed in range(4)]
    data = torch.randint(spec.vocab, (tokens // BLOCK, BLOCK), generator=torch.Generator().manual_seed(0))
    calls = {}
    for count in (2, 4):
        source, chart = Resident(*paired(*weights[:count])), Chart(spec, count, members=count)
        items = [Item(data, centroid(count), (len(data) // count,) * count)]
        calls[str(count)] = partial(learn, source, items, chart, route="weight", keep=True)
    times = {name: statistics.median(each) for name, each in interleave(calls, repeats, time.process_time).items()}
    ratio = round(times["4"] / times["2"], 3)
    return {"case": f"step of 4 against 2, width {width}, {tokens} tokens", "ms": times, "ratio": ratio}


def missed(rows: list[Row]) -> list[str]:
    """The promises that are broken."""
    found, by_case = [], {row["case"]: row for row in rows}
    for row in rows:
        if "ratio" in row and row["ratio"] > STEP:
            found.append(f"{row['case']}: {row['ratio']} > {STEP}")
    levels, joint = (by_case.get(name) for name in ("hierarchical", "joint"))
    for name, limit in MUST.items():
        if name in by_case and by_case[name]["average"] > limit:
            found.append(f"average of all, {name}: {by_case[name]['average']} > {limit}")
    if levels and joint and joint["average"] >= levels["average"]:
        found.append(f"joint ({joint['average']}) is no lower than hierarchical ({levels['average']})")
    return found


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("family", nargs="?", type=Path, help="directory of four seeds")
    parser.add_argument("--steps", type=int, default=250, help="of each alignment of two")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, help=f"measure on so many of {BLOCK} test tokens (default: all)")
    parser.add_argument("--only", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = [step_row(256 if args.quick else 384, 2048, 3 if args.quick else 9)]
    print(rows[0], flush=True)
    if args.family:
        steps, limit = (20, 32) if args.quick else (args.steps, args.blocks)
        rows += family_rows(args.family, steps, args.only, limit, batch=args.batch)
    rows = [row | provenance("lmc_fast", "benchmarks", "examples") for row in rows]
    if args.json:
        write_json(args.json, rows)
    problems = missed(rows)
    for problem in problems:
        print("missed:", problem, file=sys.stderr)
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
