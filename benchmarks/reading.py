"""Is every checkpoint read as transformers reads it? Generated variants of every family, with transformers as judge.

For each family of the test zoo transformers writes tiny random checkpoints: every option of the configuration class
(and those of other families, which it may ignore) at two values or more, nonsense included; heads tied, untied, stored
twice, alike or not, only the copy stored; one file or several; three dtypes. What our engine computes of each is
compared with what transformers computes of it. Allowed are: the same function, to twice transformers' own float32 error
against float64, or one sentence that refuses. Counted are silent differences (NaN that is accepted too) and tracebacks.
"""

import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.common import RESULTS, ROOT, Row, options, provenance, write_csv, write_json
from benchmarks.reading_options import FOREIGN, OPTIONS

sys.path[:0] = [str(ROOT / "tests" / part) for part in ("", "symmetry", "families")]

import zoo  # noqa: E402
from checkpoints_tiny import randomize  # noqa: E402

from lmc_fast import LmcError  # noqa: E402
from lmc_fast.checkpoints import Model  # noqa: E402
from lmc_fast.engine.model import logits  # noqa: E402

SOURCES = (
    "lmc_fast",
    "tests/families",
    "tests/checkpoints_tiny.py",
    "benchmarks/reading.py",
    "benchmarks/reading_options.py",
)
FLOOR = 1e-6  # of the largest output: below that float32 says nothing
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OUTCOMES = ("equal", "refused", "refused by both", "ours alone", "difference", "traceback")
TIES = ("as saved", "head stored, another", "head stored, equal", "only the head stored")
ENDS_OF_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class Variant:
    """One checkpoint: a model of the zoo, changes to its config.json, and how its weights are stored."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    sharded: bool = False
    tie: str = TIES[0]

    def __str__(self) -> str:
        parts = [f"{key}={json.dumps(value)}" for key, value in self.changes.items()]
        parts += [self.dtype] * (self.dtype != "float32") + ["sharded"] * self.sharded
        return " ".join([self.name, *parts, *[self.tie] * (self.tie != TIES[0])])


def variants(quick: bool) -> Iterator[Variant]:
    """Every variant, in an order that does not change."""
    seen = set()
    for name in zoo.ZOO:
        config = zoo.ZOO[name]().config
        for i, (dtype, sharded) in enumerate((d, s) for d in DTYPES for s in (False, True)):
            if not quick or i == 1:
                yield Variant(name, dtype=dtype, sharded=sharded)
        if getattr(config, "tie_word_embeddings", None) is not None and "clip" not in name:
            for tie in TIES[1:]:
                yield Variant(name, {"tie_word_embeddings": True}, tie=tie)
            yield Variant(name, {"tie_word_embeddings": False}, tie=TIES[1])
        if type(config) in seen:
            continue
        seen.add(type(config))
        own = {*type(config).__dataclass_fields__, *type(config).attribute_map.values()}
        for key, values in OPTIONS.items():
            if key in own or (key in FOREIGN and not quick):
                yield from (Variant(name, {key: v}) for v in (values[:1] if quick else values))


def write(variant: Variant, directory: Path) -> bool:
    """Writes the checkpoint. False where transformers builds no such model: then the weights are the plain one's."""
    model = zoo.ZOO[variant.name]()
    model.save_pretrained(directory)
    file = directory / "config.json"
    config = json.loads(file.read_text()) | variant.changes
    if variant.changes.keys() & {
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        "rotary_pct",
        "rotary_emb_base",
    }:
        config.pop("rope_parameters", None)  # as older versions wrote it
    file.write_text(json.dumps(config))
    plain, built = (directory / "model.safetensors").read_bytes(), True
    try:
        if config.get("num_hidden_layers", 0) > 100:
            raise MemoryError
        model = type(model)(transformers.AutoConfig.from_pretrained(directory))
        randomize(model, 1)
        (directory / "model.safetensors").unlink()
        model.config.output_attentions = False  # it cannot be saved; the file says what it said
        size = "12KB" if variant.sharded else "1GB"
        model.to(DTYPES[variant.dtype]).save_pretrained(directory, max_shard_size=size)
    except Exception:  # whatever it is, transformers refuses this config
        built = False
        (directory / "model.safetensors").write_bytes(plain)
    file.write_text(json.dumps(config))
    if variant.tie != TIES[0]:
        _store_head(directory, variant)
    return built


def _store_head(directory: Path, variant: Variant) -> None:
    tensors = load_file(directory / "model.safetensors")
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    heads = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "gpt_neox": "embed_out"}
    head, table = f"{heads.get(kind, 'lm_head')}.weight", next(k for k in tensors if k.endswith(ENDS_OF_TABLES))
    copies = {head: table}
    if kind in ("bert", "roberta"):
        copies[head.replace("weight", "bias")] = {"bert": "cls.predictions.bias"}.get(kind, "lm_head.bias")
    for copy, original in copies.items():
        other = torch.randn(tensors[original].shape, generator=torch.Generator().manual_seed(3)) / 4
        tensors[copy] = other if variant.tie == TIES[1] else tensors[original].clone()
        if variant.tie == TIES[3]:
            del tensors[original]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def inputs(name: str, config: dict[str, Any], longest: int) -> torch.Tensor:
    x = zoo.inputs(name)
    size = config.get("image_size")
    if x.is_floating_point() and size not in (None, 8):
        size = size if isinstance(size, int) else size[0]
        return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x if x.is_floating_point() or not longest else torch.cat([x[:, : longest - 1], x[:, -1:]], 1)


def judge(variant: Variant) -> Row:
    """What became of one variant."""
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home)
        built = write(variant, directory)
        ours: torch.Tensor | None = None
        row: Row = {"variant": str(variant), "family": variant.name}
        longest, refusal = 0, ""
        try:
            model = Model(directory)
            longest = 0 if model.spec.image else min(20, model.spec.max_positions)
            x = inputs(variant.name, model.checkpoint.config, longest)
            ours = logits(model.load(), x.float() if x.is_floating_point() else x).double()
        except LmcError as error:
            refusal = str(error).replace(home, "")
            if "\n" in refusal:
                return row | {"outcome": "traceback", "why": "a refusal of several lines"}
        except Exception as error:
            return row | {"outcome": "traceback", "why": f"{type(error).__name__}: {error}"[:200]}
        x = inputs(variant.name, json.loads((directory / "config.json").read_text()), longest)
        try:
            if not built and ours is None:
                raise AssertionError("no such model")
            truth = zoo.reference(directory, x)
            theirs = _default(directory, x).double()
        except Exception as error:  # assertions of the zoo too: tensors that transformers would make up
            if ours is None:
                return row | {"outcome": "refused by both", "why": refusal}
            return row | {"outcome": "ours alone", "why": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        if ours is None:
            return row | {"outcome": "refused", "why": refusal}
        largest = truth.abs().max().item()
        own = (theirs - truth).abs().max().item() / largest
        found = (ours - truth).abs().max().item() / largest
        row |= {"error": found, "own": own}
        if not found <= 2 * own + FLOOR or not own < 1e-3:  # NaN too
            return row | {"outcome": "difference", "why": "transformers disagrees with itself" if own >= 1e-3 else ""}
        return row | {"outcome": "equal", "why": ""}


def _default(directory: Path, x: torch.Tensor) -> torch.Tensor:
    """What transformers computes by default, in float32."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model = getattr(transformers, config.architectures[0]).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(**({"pixel_values": x.float()} if x.is_floating_point() else {"input_ids": x}))
    for name in ("logits", "prediction_logits", "image_embeds", "text_embeds"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    raise AssertionError(type(model))


def summary(rows: list[Row]) -> list[Row]:
    """One row for each model of the zoo: how many variants had which outcome, and the largest errors of equal ones."""
    found = []
    for name in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == name]
        counts = Counter(row["outcome"] for row in own)
        equal = [row for row in own if row["outcome"] == "equal"]
        worst = {key: max((row[key] for row in equal), default=0.0) for key in ("error", "own")}
        origin = {
            key: value for key, value in own[0].items() if key not in ("variant", "family", "outcome", "why", *worst)
        }
        found.append(
            {"model": name, "variants": len(own)}
            | {what.replace(" ", "_"): counts[what] for what in OUTCOMES}
            | {key: f"{value:.1e}" for key, value in worst.items()}
            | origin
        )
    return found


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--only", metavar="WORD", help="only variants whose description holds this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.filterwarnings("ignore")
    origin = provenance(*SOURCES) | {"transformers": transformers.__version__}
    rows = []
    for variant in variants(args.quick):
        if args.only and args.only not in str(variant):
            continue
        row = judge(variant)
        rows.append(row | origin)
        if len(rows) % 250 == 0:
            print(f"{len(rows)} variants", flush=True)
        if row["outcome"] in ("difference", "traceback") or args.only:
            print(
                f"{row['outcome']:16} {row['variant']}: {row.get('error', '')} {row.get('own', '')} {row['why']}",
                flush=True,
            )
    counts = Counter(row["outcome"] for row in rows)
    print(f"{len(rows)} variants: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    if args.json:
        write_json(args.json, rows)
    if not args.quick and not args.only:
        write_csv(RESULTS / "reading.csv", summary(rows))
    bad = counts["difference"] + counts["traceback"]
    if bad:
        print(f"missed: {bad} silent differences or tracebacks", file=sys.stderr)
    return 1 if args.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
