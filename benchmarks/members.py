"""Many models: what the average of four seeds costs, by every scheme, and what four cost to learn against two.

    python examples/train_pair.py --seeds 4 --jobs 2 --out FAMILY      # trained once, not part of the repository
    python -m benchmarks.members FAMILY [--steps N] [--only CASE ...] [--json FILE] [--check]

FAMILY: a directory with a/, b/, c/, d/, train.npy, val.npy, test.npy. All losses are measured by transformers alone, on
exported stock checkpoints, averaged tensor by tensor, on the test tokens (the 66 places inside: on every fourth block
of them). Learning takes as many steps in all: 3 N for four models, N for each alignment of two. Without FAMILY only the
time of a step is measured. Rows replace those of the same case in benchmarks/results/members.csv; --check judges all
that are there.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, logging

import lmc_fast as lmc
from benchmarks.common import RESULTS, Row, interleave, options, provenance, read_csv, write_csv, write_json
from benchmarks.step import random_weights, spec_of
from lmc_fast.alignment import Alignment
from lmc_fast.engine.source import Resident, paired
from lmc_fast.learning.learner import Learner
from lmc_fast.learning.schedule import Schedule
from lmc_fast.members import CLOSED_SCHEMES, member_names
from lmc_fast.places import inside

BLOCK = 128
MUST = {"hierarchical": 0.12}  # nats of the average of all over the mean of the models' own losses
AIM = {"joint": 0.06}
EDGES = 2.0  # times the worst pair's own barrier that no edge and no place inside may exceed, after joint learning
STEP = 2.2  # times the step of two that one of four may take
INSIDE, SPARSE = 66, 4  # places inside the simplex; measured on one of so many blocks
LINE = (0.3, 0.5, 0.7)  # where edges are measured
SCHEMES = ("naive", "star", "mergemany", "universe", "hierarchical", "joint", "joint from hierarchical")
STEPS = "step of 4 against 2"
SOURCES = ("lmc_fast", "benchmarks/members.py", "examples")
TARGET = RESULTS / "members.csv"


class Stock:
    """Averages of stock checkpoints, run by transformers."""

    def __init__(self, places: list[Path], tokens: Path, limit: int | None):
        loaded = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for place in places]
        self.model, self.states = loaded[0], [{n: t.clone() for n, t in m.state_dict().items()} for m in loaded]
        ids = torch.from_numpy(np.load(tokens).astype(np.int64))
        self.blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
        self.blocks = self.blocks[:: max(1, len(self.blocks) // limit)][:limit] if limit else self.blocks

    @torch.no_grad()
    def loss(self, shares: tuple[float, ...], every: int = 1) -> float:
        """On one of `every` blocks."""
        mixed = {n: sum(s * state[n] for s, state in zip(shares, self.states, strict=True)) for n in self.states[0]}
        self.model.load_state_dict(mixed)
        blocks = self.blocks[::every]
        total = 0.0
        for part in blocks.split(8):
            out = self.model(input_ids=part).logits[:, :-1].flatten(0, 1)
            total += F.cross_entropy(out, part[:, 1:].flatten(), reduction="sum").item()
        return total / (len(blocks) * (BLOCK - 1))

    def excess(self, places: list[tuple[float, ...]], every: int = 1) -> list[float]:
        """Over the same averages of the models' own losses."""
        count = len(self.states)
        ends = [self.loss(tuple(float(k == i) for k in range(count)), every) for i in range(count)]
        return [self.loss(p, every) - sum(s * end for s, end in zip(p, ends, strict=True)) for p in places]

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


def measured(places: list[Path], tokens: Path, limit: int | None, inside_too: bool) -> Row:
    """Excess of the average of all, and of the worst place on every edge; inside_too: of the worst of INSIDE places."""
    stock, count = Stock(places, tokens, limit), len(places)
    lines = {
        f"{i}-{j}": [tuple((1 - t) * (k == a) + t * (k == b) for k in range(count)) for t in LINE]
        for (a, i), (b, j) in combinations(enumerate(member_names(count)), 2)
    }
    average, *rest = stock.excess([(1 / count,) * count, *(place for line in lines.values() for place in line)])
    edges = {name: max(rest[len(LINE) * k : len(LINE) * (k + 1)]) for k, name in enumerate(lines)}
    found: Row = {"average": round(average, 4), "edges": {name: round(value, 4) for name, value in edges.items()}}
    found |= {"worst_edge": round(max(edges.values()), 4)}
    if inside_too:
        worst = max(stock.excess([inside(k, count) for k in range(INSIDE)], SPARSE))
        own = sum(stock.loss(tuple(float(k == i) for k in range(count))) for i in range(count)) / count
        found |= {"worst_inside": round(worst, 4), "ensemble": round(stock.ensemble() - own, 4)}
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
    if scheme == "joint from hierarchical":  # the steps of three alignments for four
        levels = {"scheme": "joint", "start": "hierarchical", "steps": max(1, 3 * steps // 4)}
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
            row = measured(places, family / "test.npy", limit, scheme.startswith(("joint", "hier")))
        taken = 0 if scheme in ("naive", *CLOSED_SCHEMES) else 3 * steps
        rows.append({"case": scheme, "steps": taken, "seconds": round(seconds, 1)} | row)
        print(rows[-1], flush=True)
    return rows


def step_row(width: int, tokens: int, repeats: int) -> Row:
    """Processor time of a whole step of learning, of two and of four models."""
    spec = replace(spec_of(width), vocab=4096)
    weights = [random_weights(spec, seed) for seed in range(4)]
    data = torch.randint(spec.vocab, (tokens // BLOCK, BLOCK), generator=torch.Generator().manual_seed(0))
    learners = {n: Learner(Resident(*paired(*weights[:n])), data, Schedule(batch=len(data))) for n in (2, 4)}
    calls = {str(count): learner.step for count, learner in learners.items()}
    times = {name: statistics.median(each) for name, each in interleave(calls, repeats, time.process_time).items()}
    ratio = round(times["4"] / times["2"], 3)
    routes = {str(count): learner.route for count, learner in learners.items()}
    return {"case": STEPS, "width": width, "tokens": tokens, "ms": times, "ratio": ratio, "routes": routes}


def missed(rows: list[Row]) -> tuple[list[str], list[str]]:
    """The promises that are broken or were not measured, and the aims that are not reached."""
    by_case = {row["case"]: row for row in rows}
    needed = (STEPS, "star", "hierarchical", "joint")
    found = [f"{name} was not measured" for name in needed if name not in by_case]
    if found:
        return found, []
    steps, star, levels, joint = (by_case[name] for name in needed)
    own = max(value for name, value in star["edges"].items() if name.startswith("a-"))  # each pair aligned by itself
    limits = [(f"{STEPS}, time", steps["ratio"], STEP)]
    limits += [(f"average of all, {name}", by_case[name]["average"], limit) for name, limit in MUST.items()]
    limits += [(f"joint, {name}", joint[name], EDGES * own) for name in ("worst_edge", "worst_inside")]
    found = [f"{name}: {value} > {limit:.4g}" for name, value, limit in limits if value > limit]
    if joint["average"] >= levels["average"]:
        found.append(f"joint ({joint['average']}) is no lower than hierarchical ({levels['average']})")
    aims = [(name, by_case[name]["average"], limit) for name, limit in AIM.items()]
    return found, [f"average of all, {name}: {value} > {limit}" for name, value, limit in aims if value > limit]


def kept(rows: list[Row]) -> list[Row]:
    """These rows and those of other cases that were measured before, in the order of the cases."""
    found = {row["case"]: {key: _read(cell) for key, cell in row.items() if cell} for row in read_csv(TARGET)}
    found |= {row["case"]: row for row in rows}
    return [found[case] for case in (*SCHEMES, STEPS) if case in found]


def _read(cell: str) -> object:
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("family", nargs="?", type=Path, help="directory of four seeds")
    parser.add_argument("--steps", type=int, default=300, help="of each alignment of two (default: 300)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, help=f"measure on so many blocks of {BLOCK} test tokens (default: all)")
    parser.add_argument("--only", nargs="+", choices=(*SCHEMES, "step"), default=[*SCHEMES, "step"])
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    if "step" in args.only:
        rows.append(step_row(256 if args.quick else 384, 2048, 3 if args.quick else 9))
        print(rows[0], flush=True)
    if args.family:
        steps, limit = (20, 32) if args.quick else (args.steps, args.blocks)
        schemes = [scheme for scheme in args.only if scheme != "step"]
        rows += family_rows(args.family, steps, schemes, limit, batch=args.batch)
    rows = [row | provenance(*SOURCES) for row in rows]
    if args.json:
        write_json(args.json, rows)
    if not args.quick:
        rows = kept(rows)
        cells = [{key: json.dumps(x) if isinstance(x, dict) else x for key, x in row.items()} for row in rows]
        write_csv(TARGET, cells)
    problems, aims = missed(rows)
    for text in problems:
        print("missed:", text, file=sys.stderr)
    for text in aims:
        print("an aim, not reached:", text, file=sys.stderr)
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
