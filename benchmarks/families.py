"""Every model family on tiny random checkpoints: is a randomly moved, exported model the same function, and stock?

For each variant of the test zoo: transformers writes a checkpoint with random parameters; the engine's logits are
compared with transformers'; the canonical form is moved by a random element of the whole legal group and exported in
float64; transformers loads the result with its own class (every tensor in place, none left over) and its outputs are
compared with the original's. A full run writes docs/families.md.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers

from benchmarks.common import ROOT, Row, options, provenance, write_json

sys.path[:0] = [str(ROOT / "tests" / part) for part in ("", "symmetry", "families")]

import zoo  # noqa: E402
from elements import KNOWN, random_element  # noqa: E402

from lmc_fast.architectures import Spec  # noqa: E402
from lmc_fast.checkpoints import Model, export  # noqa: E402
from lmc_fast.engine.model import logits  # noqa: E402
from lmc_fast.model_types import KNOWN_AS, REFUSED  # noqa: E402
from lmc_fast.symmetry import canonicalize, check_legal, legal_groups  # noqa: E402

SOURCES = ("lmc_fast", "tests/families", "tests/checkpoints_tiny.py", "benchmarks/families.py", "benchmarks/common.py")
TABLE = ROOT / "docs" / "families.md"
LIMIT = 1e-12
SEEDS = (1, 2, 3)

INTRODUCTION = """# Model families

Written by `python -m benchmarks.families` (commit {commit}, torch {torch}, transformers {transformers}, {device}).

Each row is a tiny checkpoint of that family with random parameters. *Engine*: largest difference of our logits from
transformers' in float64 (its casts to float32 taken out), relative to the largest logit. *Moved*: the model is brought
into canonical form, moved by {seeds} random elements of its whole legal group, and exported; the largest difference of
what transformers computes from the exported and from the original checkpoint. Compared are log-probabilities of
language models, logits of classifiers, features of towers. *Stock*: transformers' own class loads the export, every
tensor in place and none left over. `lmc-fast inspect` prints a checkpoint's groups with the reasons.

| variant | model_type | residual stream | heads | value/output | query/key | FFN | engine | moved | stock |
|---|---|---|---|---|---|---|---|---|---|
"""


NAMES = """
## What people know them as

A text model's trunk alone, and its classifiers of texts and tokens, are read under the same model_type.

| model_type | checkpoints |
|---|---|"""
OTHERS = """
## Refused, and why

| model_type | reason |
|---|---|"""


def measure(name: str, seeds: tuple[int, ...]) -> Row:
    """One row of the table."""
    x = zoo.inputs(name)
    with tempfile.TemporaryDirectory() as home:
        original = Path(home) / "original"
        zoo.write(name, original)
        expected = zoo.reference(original, x)
        model = Model(original)
        weights = model.load(torch.float64)
        engine = _relative(logits(weights, x), expected)
        weights, moved, stock = canonicalize(weights), 0.0, True
        for seed in seeds:
            element = random_element(KNOWN[name], model.spec, seed)
            check_legal(element, model.spec)
            out = Path(home) / f"moved-{seed}"
            export(element.apply(weights), model, out, torch.float64)
            try:
                found = zoo.reference(out, x)
            except (AssertionError, RuntimeError, ValueError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                stock = False
                continue
            moved = max(moved, _relative(zoo.outcome(name, found), zoo.outcome(name, expected)))
    kind = model.checkpoint.config["model_type"]
    return {"variant": name, "model_type": kind, **groups(model.spec), "engine": engine, "moved": moved, "stock": stock}


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def groups(spec: Spec) -> dict[str, str]:
    """The legal groups in a few words."""
    what = {group.name: group.what.replace(" per key/value group", "") for group in legal_groups(spec) if group.legal}
    att, experts = spec.attention, spec.ffn.experts
    heads = [f"{att.kv_heads} groups" if att.queries_per_group > 1 else f"{att.heads} heads"]
    heads += [f"{att.queries_per_group} queries in each"] if "queries" in what else []
    parts = [f"{spec.ffn.width} units"] if "FFN units" in what else []
    parts += [what["FFN scales"].split(" factor")[0] + " scale"] if "FFN scales" in what else []
    parts += [f"{experts.count} experts, each {experts.width} units, any non-zero scale"] if experts.count else []
    return {
        "residual": what.get("residual rotation", "none (it is the output)"),
        "heads": "permute " + ", ".join(heads) if "heads" in what else "none (ALiBi)",
        "value_output": what["value/output maps"],
        "query_key": what["query/key maps"],
        "ffn": ", ".join(parts),
    }


def table(rows: list[Row], origin: Row, seeds: int) -> str:
    lines = [
        f"| {row['variant']} | {row['model_type']} | {row['residual']} | {row['heads']} | {row['value_output']} "
        f"| {row['query_key']} | {row['ffn']} | {row['engine']:.0e} | {row['moved']:.0e} "
        f"| {'yes' if row['stock'] else 'NO'} |"
        for row in rows
    ]
    names = [f"| {kind} | {known} |" for kind, known in sorted(KNOWN_AS.items())]
    others = [f"| {kind} | {why} |" for kind, why in sorted(REFUSED.items())]
    ends = [*NAMES.splitlines(), *names, *OTHERS.splitlines(), *others]
    return INTRODUCTION.format(**origin, seeds=seeds) + "\n".join([*lines, *ends]) + "\n"


def main() -> int:
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    names = list(zoo.ZOO)
    if args.quick:  # one variant of each family, one random element
        kinds = {name: zoo.ZOO[name]().config.model_type for name in names}
        names = [name for i, name in enumerate(names) if kinds[name] not in [kinds[n] for n in names[:i]]]
    seeds = SEEDS[:1] if args.quick else SEEDS
    origin = provenance(*SOURCES) | {"transformers": transformers.__version__}
    rows = []
    for name in names:
        row = measure(name, seeds)
        rows.append(row | origin)
        print(
            f"{name:26} engine {row['engine']:.1e}  moved {row['moved']:.1e}  stock {'yes' if row['stock'] else 'NO'}"
        )
    if args.json:
        write_json(args.json, rows)
    if not args.quick:
        TABLE.write_text(table(rows, origin, len(seeds)), encoding="utf-8")
        print(f"wrote {TABLE.relative_to(ROOT)}")
    bad = [row["variant"] for row in rows if not row["stock"] or max(row["engine"], row["moved"]) > LIMIT]
    if bad:
        print(f"missed: {', '.join(bad)} (limit {LIMIT:g}, and stock)", file=sys.stderr)
    return 1 if args.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
