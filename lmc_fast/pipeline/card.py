"""Where a merged model comes from, told beside its weights: README.md, and mergekit_config.yml as mergekit has it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..architectures import Family
from ..checkpoints import Model
from ..errors import LmcError
from ..files import MIB, read_object
from ..version import __version__
from .shares import Shares, is_behind

CARD_NAMES: dict[str, None] = {"README.md": None, "mergekit_config.yml": None}
_REPORT_BYTES = 1 << 30


def record_of(
    models: Sequence[Model], shares: Shares, base: bool, dtype: torch.dtype, notes: Sequence[str]
) -> dict[str, Any]:
    """What was merged, as JSON. The digests are those of `sha256sum`, and of the hub's pages."""
    members: list[dict[str, Any]] = [_facts(model) for model in models]
    found: dict[str, Any] = {
        "method": "task_arithmetic" if base else "linear",
        "models": members[:-1] if base else members,
        "base": members[-1] if base else None,
        "weights": list(shares.weights),
    }
    if len(models) == 2 and not base:
        found["weight"] = shares.weights[1]
    ends = {name: list(row) for name, row in (("embed", shares.embed), ("head", shares.head)) if row}
    blocks = {str(block): list(row) for block, row in sorted(shares.blocks.items())}
    return found | {
        "weights_by_block": (ends | blocks) or None,
        "dtype": str(dtype).removeprefix("torch."),
        "barrier": _barrier(models),
        "notes": list(notes),
        "version": __version__,
    }


def write_card(directory: Path, record: dict[str, Any], family: Family) -> None:
    """README.md and mergekit_config.yml into a directory. Raises OSError."""
    config = yaml.safe_dump(_mergekit(record, family), sort_keys=False)
    (directory / "mergekit_config.yml").write_text(config, encoding="utf-8")
    (directory / "README.md").write_text(_card(record, config), encoding="utf-8")


def _facts(model: Model) -> dict[str, Any]:
    return {
        "source": model.source,
        "dtype": str(model.dtype).removeprefix("torch."),
        "sha256": {file.name: _sha256(file) for file in model.checkpoint.identity.files},
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while part := handle.read(MIB):
            digest.update(part)
    return digest.hexdigest()


def _barrier(models: Sequence[Model]) -> dict[str, Any] | None:
    """Of the line between two models, where the report of the run that aligned them lies beside them."""
    if len(models) != 2 or models[0].path.parent != models[1].path.parent:
        return None
    file = models[0].path.parent / "report.json"
    if not file.is_file():
        return None
    try:
        report = read_object(file, _REPORT_BYTES)
        names = {member["name"] for member in report["members"]}
        curve = report["curves"][-1]
        barrier, at = float(curve["barrier"]), float(curve["at"])
    except (LmcError, KeyError, IndexError, TypeError, ValueError):
        return None  # another program's
    if names != {model.path.name for model in models} or not math.isfinite(barrier + at):
        return None
    unit = str(curve.get("unit", "nats"))
    return {"nats": barrier, "unit": unit, "at": at, "between": sorted(names), "curve": str(curve.get("name"))}


def _mergekit(record: dict[str, Any], family: Family) -> dict[str, Any]:
    """What mergekit would have to be told; `filter` is a part of a tensor's name there."""
    by_block: dict[str, list[float]] = record["weights_by_block"] or {}
    usual: list[float] = record["weights"]
    block = family.block[0].name.partition("{i}")[0].removeprefix(family.prefix)
    behind = [e.name.removeprefix(family.prefix) for e in family.ends if is_behind(e.slots[0])]
    rows = [(f"{block}{name}.", row) for name, row in by_block.items() if name not in ("embed", "head")]
    rows += [(block, usual), *((name, by_block.get("head", usual)) for name in behind)]

    def weight(i: int) -> Any:
        if not by_block:
            return usual[i]
        conditions: list[dict[str, Any]] = [{"filter": name, "value": row[i]} for name, row in rows]
        return [*conditions, {"value": by_block.get("embed", usual)[i]}]

    models = [
        {"model": member["source"], "parameters": {"weight": weight(i)}} for i, member in enumerate(record["models"])
    ]
    found: dict[str, Any] = {"merge_method": record["method"], "models": models}
    if record["base"]:
        found |= {"base_model": record["base"]["source"], "parameters": {"normalize": False}}
    return found | {"dtype": "float32", "out_dtype": record["dtype"]}


def _card(record: dict[str, Any], config: str) -> str:
    members = record["models"] + ([record["base"]] if record["base"] else [])
    on_hub = [member["source"] for member in members if not Path(member["source"]).exists()]
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "lmc-fast"]}
    head |= {"base_model": on_hub} if on_hub else {}
    weights = [*(f"{w:g}" for w in record["weights"]), "base"]
    rows = [f"| {_cell(m['source'])} | {w} | {m['dtype']} |" for m, w in zip(members, weights, strict=False)]
    how = "base + Σ weight (model - base)" if record["base"] else "Σ weight model"
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# A merge of {len(record['models'])} models\n",
        f"{how}, tensor by tensor, by lmc_fast {record['version']}; written in {record['dtype']}.\n",
        "| model | weight | stored in |\n|---|---|---|",
        *rows,
        "",
    ]
    if record["weights_by_block"]:
        lines.append("Some blocks have other weights, see below.\n")
    if record["barrier"]:
        found = record["barrier"]
        lines.append(
            f"The loss along the line between {' and '.join(found['between'])} lies at most "
            f"{found['nats']:.4f} {found['unit']} above the straight line (at {found['at']:.2f}), says the report of "
            "the run that aligned them.\n"
        )
    lines += [f"Note: {_cell(note)}.\n" for note in record["notes"]]
    lines.append("SHA-256 of what was merged:\n\n```")
    lines += [f"{digest}  {_cell(m['source'])}/{file}" for m in members for file, digest in m["sha256"].items()]
    lines.append(f"```\n\nThe same for mergekit:\n\n```yaml\n{config}```\n")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A name from outside inside a table of Markdown."""
    return "".join(c if c.isprintable() and c not in "|`<" else "_" for c in text)
