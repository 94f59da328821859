"""SUMMARY.md, one page, and a CSV file for each slice: made from the rows, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import Row, write_csv
from benchmarks.gpu.promises import OPEN, PROMISES, on_gpu, problems
from benchmarks.gpu.slices import SLICES, kind

GIB = 1 << 30


def write_summary(out: Path, rows: Sequence[Row], quick: bool) -> None:
    """OUT/SUMMARY.md and OUT/<slice>.csv (a quick run writes quick-<slice>.csv) of the latest rows."""
    for name in SLICES:
        some = [{k: v for k, v in row.items() if k != "trace"} for row in rows if kind(row["slice"]) == name]
        if some:
            write_csv(out / f"{'quick-' if quick else ''}{name}.csv", some)
    (out / "SUMMARY.md").write_text(summary(rows, quick))


def summary(rows: Sequence[Row], quick: bool) -> str:
    lines = ["# GPU measurements", ""]
    if quick:
        lines += ["Quick run: tiny shapes, to try the harness. Nothing on this page is a measurement of a GPU.", ""]
    lines += [*_origin(rows), "", "## Promised and measured", ""]
    lines += ["| slice | what | promised | measured | |", "|---|---|---|---|---|"]
    for p in PROMISES:
        value = p.measured(rows)
        verdict = p.verdict(rows)
        shown = "-" if value is None else f"{value:.3g}"
        lines.append(f"| {p.slice} | {p.text} | {p.limit_text} | {shown} | {verdict} |")
    lines += ["", "The worst row of each kind counts, where nothing else is said.", ""]
    for name, what in SLICES.items():
        some = [row for row in rows if kind(row["slice"]) == name]
        lines += [f"## {name}: {what.what}", "", *_counts(some)]
        good = [row for row in some if on_gpu(row)]
        if good:
            lines += ["", *TABLES[name](good)]
        lines.append("")
    found = problems(rows)
    if found:
        lines += ["## Problems", "", *(f"- {text}" for text in found), ""]
    return "\n".join(lines)


def _origin(rows: Sequence[Row]) -> list[str]:
    """Devices, versions and commits that the rows come from."""
    if not rows:
        return [f"{OPEN.capitalize()}: there are no rows."]
    names = {
        "device": "device",
        "commit": "commit",
        "torch": "torch",
        "triton": "triton",
        "cuda": "CUDA",
        "python": "Python",
    }
    parts = [f"{title} {', '.join(sorted({str(row[key]) for row in rows}))}" for key, title in names.items()]
    first, last = min(row["started"] for row in rows), max(row["started"] for row in rows)
    return ["; ".join(parts) + ".", f"Rows were begun between {first} and {last}."]


def _counts(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return [f"{OPEN.capitalize()}."]
    unmeasured: dict[str, int] = {}
    for row in rows:
        if "unmeasured" in row:
            unmeasured[row["unmeasured"]] = unmeasured.get(row["unmeasured"], 0) + 1
    errors = sum("error" in row for row in rows)
    measured = sum(on_gpu(row) for row in rows)
    text = f"{measured} rows measured on a GPU, {errors} with an error"
    return [text + "".join(f"; {count} not measured: {why}" for why, count in unmeasured.items()) + "."]


def _table(heads: Sequence[str], body: Sequence[Sequence[object]]) -> list[str]:
    head, *lines = ("| " + " | ".join(map(str, cells)) + " |" for cells in (heads, *body))
    return [head, "|" + "---|" * len(heads), *lines]


def _tests(rows: Sequence[Row]) -> list[str]:
    total = {name: sum(row[name] for row in rows) for name in ("passed", "failed", "skipped")}
    lines = [f"{len(rows)} files: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped."]
    return lines + [f"- {row['key']}: {', '.join(row['failures'])}" for row in rows if row["failed"]]


def _kernels(rows: Sequence[Row]) -> list[str]:
    """For each operation and pass in bfloat16: the ratios by model and tokens."""
    body = []
    some = [row for row in rows if row["dtype"] == "bfloat16" and "ratio" in row]
    for op, which in sorted({(row["op"], row["pass"]) for row in some}):
        of = [row for row in some if (row["op"], row["pass"]) == (op, which)]
        ratios = sorted(row["ratio"] for row in of)
        used = sum(row.get("verdict") != "not used" for row in of)
        few = "; ".join(f"{row['model']} T{row['tokens']} {row['ratio']}" for row in of if row["tokens"] in (0, 16384))
        judged = f"{used} of {len(of)}" if op != "interp_linear" else "-"
        body.append((op, which, f"{ratios[0]} - {ratios[-1]}", judged, few or "-"))
    heads = ("operation", "pass", "ratio", "shapes at which it is worth its use", "at 16384 tokens (0: no tokens)")
    lines = _table(heads, body)
    lines += [
        "",
        "Ratio: best torch formulation / ours; interp_linear: best path / the one that dispatch chose. A kernel",
    ]
    lines.append("below 0.9 at a shape is not used there. bfloat16; other dtypes are in kernels.csv.")
    wrong = [row["key"] for row in rows if row.get("accurate") is False]
    return lines + ([f"Less accurate than torch: {', '.join(wrong)}."] if wrong else [])


def _solvers(rows: Sequence[Row]) -> list[str]:
    heads = ("case", "torch.linalg ms", "ours ms", "ratio", "promised", "error ours / torch")
    body = []
    for row in rows:
        errors = f"{row['ours_error']:.1e} / {row['torch_error']:.1e}" if "ours_error" in row else "-"
        body.append((row["key"], row["torch_ms"], row["ours_ms"], row["ratio"], row["need"] or "-", errors))
    return _table(heads, body)


def _step(rows: Sequence[Row]) -> list[str]:
    heads = ("shape", "tokens", "variant", "ms", "times the floor", "peak MiB")
    wanted = ("floor", "ours", "ours + recompute", "ours, no kernels", "ours, divergence", "rotation alone")
    body = [
        (
            f"{row['shape']}, {row['layers']} blocks",
            row["tokens"],
            _picked(row),
            row["ms"],
            row.get("per_floor", "-"),
            row["peak_mib"],
        )
        for row in rows
        if row["variant"] in wanted
    ]
    return _table(heads, body)


def _picked(row: Row) -> str:
    return f"{row['variant']} ({row['picked']})" if row["picked"] else row["variant"]


def _streaming(rows: Sequence[Row]) -> list[str]:
    heads = (
        *("blocks", "tokens", "variant", "streamed s", "in memory s", "speed", "stalled s"),
        *("moved GiB", "peak GiB", "planned s", "planned GiB"),
    )
    body = [
        (
            f"{row['layers']} of {row['layers_wanted']}",
            row["tokens"],
            f"{row['variant']} ({row['resident']} units resident)",
            round(row["streamed_ms"] / 1e3, 3),
            round(row["resident_ms"] / 1e3, 3),
            row["ratio"],
            row["stall_s"],
            round(row["moved_bytes"] / GIB, 2),
            round(row["peak_bytes"] / GIB, 2) if "peak_bytes" in row else "-",
            row.get("planned_step_s", "-"),
            round(row["planned_total_bytes"] / GIB, 2) if "planned_step_s" in row else "-",
        )
        for row in rows
    ]
    return _table(heads, body)


def _pair(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["key"].startswith("train"):
            lines.append(
                f"- seed {row['seed']}: {row['parameters']:,} parameters, {row['tokens']:,} tokens in "
                f"{row['seconds']} s, validation loss {row['val_loss']}"
            )
        if row["key"] == "align":
            lines.append(
                f"- barrier naive {row['barrier_naive']}, matched {row['barrier_matched']}, learned "
                f"{row['barrier_learned']} nats; matching {row['matching_seconds']} s, {row['steps']} steps in "
                f"{row['learning_seconds']} s, peak {row.get('peak_bytes', 0) / GIB:.2f} GiB"
            )
    return lines


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "tests": _tests,
    "kernels": _kernels,
    "solvers": _solvers,
    "step": _step,
    "streaming": _streaming,
    "pair": _pair,
}
