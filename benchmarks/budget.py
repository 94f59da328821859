"""Is a memory budget kept where it is smallest? Of each pair (synthetic GPT-NeoX, random weights, B planted in A):

the budget that `align --memory 1MiB` names must be accepted when it is typed, and every stage of that run stay below it
and 5 %. The same for `verify`, `barrier`, `barrier --alignment` and `carry --onto`; `merge` has to do with what `align`
was given. And for `align` of four models, and of a smaller model with a larger one, where `grow` has to do with what
`align` was given.

python -m benchmarks.budget [--quick] [--only-align] [--many] [--width WIDTH] [--tokens N] [--pairs I...]
        [--check] [--directory DIR]
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, Row, lmc_fast, options, provenance, read_csv, write_csv, write_json
from benchmarks.synthetic import Shape, write_pair

SOURCES = ("lmc_fast", "benchmarks")
MARGIN = 1.05  # the promise: the budget and 5 %
TOKENS = 12_000  # statistics of activations are taken from as many as fit
CASES = [(shape, 128) for shape in (Shape(256, 4, 4, 16384), Shape(512, 3, 8, 50304), Shape(128, 4, 4, 4096))]
CASES += [(Shape(64, 3, 4, 512), 128), (Shape(256, 12, 4, 2048), 128)]
CASES += [(Shape(256, 2, 4, 2048), 1024), (Shape(768, 2, 12, 8192), 128)]
QUICK = [CASES[0], CASES[3]]
MANY = {  # four models; a smaller one and a larger one
    "four": [Shape(256, 4, 4, 16384)] * 4,
    "grown": [Shape(192, 3, 3, 16384), Shape(256, 4, 4, 16384)],
}


def named(*command: object) -> int:
    """The smallest budget, in MiB, that a command names when it is given too little."""
    status, _, _, errors = lmc_fast(*command, "--memory", "1MiB", "--quiet")
    found = re.search(r"smallest budget that works is (\d+)MiB", errors)
    if status != 2 or not found:
        raise SystemExit(f"lmc-fast {command[0]} --memory 1MiB: exit status {status}: {errors}")
    return int(found[1])


def measured(case: str, budget: int, *command: object, limit: bool = True) -> list[Row]:
    """A command within a budget in MiB: a row for all of it and, of align, one for each stage."""
    status, peak, text, errors = lmc_fast(*command, "--json", *(["--memory", f"{budget}MiB"] if limit else []))
    if status:
        print(f"{case}: lmc-fast {command[0]} within {budget} MiB: exit status {status}: {errors}", flush=True)
        return [row(case, command[0], budget, None)]
    peaks = {}
    if command[0] == "align":
        peaks = {stage["name"]: stage["peak_rss"] for stage in json.loads(text)["costs"]["stages"]}
    name = " ".join([str(command[0]), *(str(c) for c in command if c == "--alignment")])
    # the system's figure starts anew with each stage
    return [
        row(case, name, budget, max(peak, *peaks.values(), 0)),
        *(row(case, f"  {n}", budget, p) for n, p in peaks.items()),
    ]


def row(case: str, what: object, budget: int, peak: int | None) -> Row:
    """peak: None where the budget was refused."""
    ok = peak is not None and peak <= MARGIN * budget * 2**20
    mib = 0 if peak is None else round(peak / 2**20)
    print(f"{case:34} {what:20} {budget:6} MiB allowed {mib:6} MiB {'ok' if ok else 'MISSED'}", flush=True)
    return {"case": case, "what": str(what).strip(), "budget_mib": budget, "peak_mib": mib, "ok": ok}


def rows_of_many(place: Path, name: str, shapes: list[Shape], length: int, tokens: int) -> list[Row]:
    """Of models that are written here, or lie here already; of one shape there are two, as often as they are needed."""
    models = []
    for k, shape in enumerate(shapes):
        home = place / "-".join(map(str, shape))
        if not home.exists():
            write_pair(home, shape, tokens=tokens)
        models.append(place / f"model-{k}")
        shutil.copytree(home / "ab"[k % 2], models[-1], copy_function=os.link, dirs_exist_ok=True)
    data = ["--data", home / "tokens.npy", "--block", length]
    align = ["align", *models, *data, "--steps", 2, "--batch", 4, "--out", place / "out"]
    case, budget = f"{name}: {', '.join(str(tuple(s)) for s in dict.fromkeys(shapes))}", named(*align)
    rows = measured(case, budget, *align)
    if len(set(shapes)) > 1:
        grow = ["grow", models[0], "--like", models[1], "--out", place / "larger"]
        rows += measured(case, budget, *grow, limit=False)
    return rows


def rows_of(pair: Path, shape: Shape, length: int, others: bool) -> list[Row]:
    """others: also of the commands beside align."""
    case = f"{shape.width} x {shape.layers}, vocabulary {shape.vocab}, blocks of {length}"
    if not (pair / "tokens.npy").exists():
        write_pair(pair, shape, tokens=TOKENS)
    ids = np.load(pair / "tokens.npy")
    held_out, out = pair / "held-out.npy", pair / "out"
    np.save(held_out, ids[: 4 * length])
    a, b = pair / "a", pair / "b"
    data = ["--data", pair / "tokens.npy", "--val", held_out, "--block", length]
    align = ["align", a, b, *data, "--steps", 2, "--batch", 4, "--out", out]
    budget = named(*align)
    rows = measured(case, budget, *align)
    if not others or not out.exists():
        return rows
    line = ["--data", held_out, "--block", length]
    alignment = ["--alignment", out / "alignment.safetensors"]
    for command in (
        ["barrier", a, b, *line],
        ["barrier", a, b, *line, *alignment],
        ["verify", a, out / "a", *line[:2]],
    ):
        rows += measured(case, named(*command), *command)
    child = shutil.copytree(b, pair / "child", copy_function=os.link, dirs_exist_ok=True)
    carry = ["carry", alignment[1], child, "--from", "b", "--onto", out / "a", "--out", pair / "carried"]
    rows += measured(case, named(*carry), *carry)
    return rows + measured(case, budget, "merge", out / "a", out / "b", "--out", pair / "merged", limit=False)


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--only-align", action="store_true", help="none of the other commands")
    parser.add_argument("--many", action="store_true", help="only four models, and models of two sizes")
    parser.add_argument("--width", type=int, help="one case more of four models: two blocks of this width")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the data of four models (default: %(default)s)")
    numbers = range(len(CASES))
    parser.add_argument(
        "--pairs", nargs="+", type=int, choices=numbers, metavar="I", help="only pairs of these numbers"
    )
    parser.add_argument("--directory", type=Path, help="write pairs here (1 GB)")
    args = parser.parse_args()
    rows: list[Row] = []
    origin = provenance(*SOURCES)

    def keep(found: list[Row]) -> None:
        """In the place of earlier rows of the same case."""
        rows.extend(made | origin for made in found)
        if args.json:
            write_json(args.json, rows)
        if not args.quick:
            earlier = read_csv(RESULTS / "budget.csv")
            write_csv(RESULTS / "budget.csv", [r for r in earlier if r["case"] not in {m["case"] for m in rows}] + rows)

    many = MANY | ({"four wide": [Shape(args.width, 2, args.width // 128)] * 4} if args.width else {})
    for name, shapes in {}.items() if args.pairs else many.items():
        with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
            keep(rows_of_many(Path(scratch), name, shapes, 128, args.tokens))
    pairs = [CASES[i] for i in args.pairs or numbers]
    for shape, length in [] if args.many else QUICK if args.quick else pairs:
        with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
            keep(rows_of(Path(scratch), shape, length, not args.only_align))
    return 1 if args.check and not all(made["ok"] for made in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
