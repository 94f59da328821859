"""report.html: what report.json says, for people, in one file that needs nothing from elsewhere.

Two runs that reach the same bits write the same page: time and memory stay in report.json.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import printable

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
table { border-collapse: collapse; margin: .5rem 0 } th, td { text-align: left; padding: .2rem .8rem .2rem 0 }
th { font-weight: 600; border-bottom: 1px solid #8888 } td.number { font-variant-numeric: tabular-nums }
img { max-width: 100%; background: white } .verdict { font-size: 1.15rem } code { font-size: .9em }
"""
_HEAD = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width">\n'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'\">\n"
)
_PICTURES = {
    "curve.png": "Loss along the line between the models",
    "learning.png": "Loss while learning, and held-out excess",
}


def page(report: dict[str, Any], directory: Path) -> str:
    """The page of a run's report; pictures are those that lie in `directory`."""
    members = [(m["name"], m["source"]) for m in report["members"]]
    title = f"{_listed(source for _, source in members)}, aligned"
    curves: Sequence[dict[str, Any]] = report.get("curves", [])
    parts = [f"<h1>{_text(title)}</h1>", *(f'<p class="verdict">{_text(line)}</p>' for line in _verdict(report))]
    if curves:
        parts += ["<h2>The line between them</h2>", _curves(curves), f"<p>{_text(report['definition'])}.</p>"]
    parts += [_picture(directory / name, text) for name, text in _PICTURES.items() if (directory / name).is_file()]
    parts += ["<h2>Proof</h2>", _proof(report["proof"], dict(members))]
    if "history" in report:
        parts += ["<h2>Learning</h2>", *_learning(report)]
    if report.get("notes"):
        parts += ["<h2>Notes</h2>", _items(report["notes"])]
    settings = {name: report[name] for name in ("method", "scheme", "start", "activations") if name in report}
    settings |= report.get("schedule") or {}
    parts += ["<h2>Settings</h2>", _table(("setting", "value"), settings.items())]
    digests = report.get("inputs", {}).get("members", [])
    rows = [(n, f, d) for (n, _), files in zip(members, digests, strict=False) for f, d in files.items()]
    if rows:
        parts += ["<details><summary>SHA-256 of what was read</summary>", _table(("of", "file", "digest"), rows)]
        parts += ["</details>"]
    parts += [f"<p>lmc-fast {_text(report['version'])}. Time and memory of every stage are in report.json.</p>"]
    head = f"{_HEAD}<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def _verdict(report: dict[str, Any]) -> list[str]:
    worst = max(found["kl"] for found in report["proof"].values())
    lines = [f"Each model computes what it did: at most {worst:.1e} nats (KL) from its original."]
    curves = report.get("curves", [])
    if len(curves) > 1:
        first, last = curves[0], curves[-1]
        lines += [
            f"The barrier is {last['barrier']:.3f} {last.get('unit', 'nats')}, and was {first['barrier']:.3f} before."
        ]
    return lines


def _curves(curves: Sequence[dict[str, Any]]) -> str:
    if "centroid" in curves[0]:
        rows = [(c["name"], *(_nats(c[key]) for key in ("barrier", "centroid", "ensemble"))) for c in curves]
        table = _table(("", "barrier", "average of all, above the mean of their losses", "loss of the ensemble"), rows)
        edges = [(name, *(_nats(c["edges"][name]) for c in curves)) for name in curves[0]["edges"]]
        return table + _table(("barrier of the line", *(c["name"] for c in curves)), edges)
    keys = ("barrier", "at", "middle", "lowest", "lowest_at")
    rows = [(c["name"], *(_nats(x) for x in (*map(c.get, keys), c["losses"][0], c["losses"][-1]))) for c in curves]
    heads = ("", "barrier", "at lambda", "middle", "lowest", "at lambda", "loss of the first", "of the last")
    return _table(heads, rows)


def _proof(proof: dict[str, Any], sources: dict[str, str]) -> str:
    rows = [
        (name, sources.get(name, ""), f"{p['kl']:.1e}", f"{p['max_log_probability']:.1e}", p["by"])
        for name, p in proof.items()
    ]
    return _table(("", "written from", "KL, nats", "largest |log-probability difference|", "compared by"), rows)


def _learning(report: dict[str, Any]) -> list[str]:
    history, step = report["history"], report.get("exported_step", 0)
    excess = {int(at): value for at, value in history["excess"].items()}
    said = f"{len(history['loss'])} steps; the state of step {step} was written"
    if step and "objective" in report:
        said += ", learned from " + ("the text" if report["objective"] == "text" else "the endpoints' predictions")
    if 0 in excess and step in excess:
        said += f"; held-out excess {excess[0]:+.4f} nats after matching, {excess[step]:+.4f} in what was written"
    turns = [f"step {turn['step']}: {turn['why']}" for turn in history["turns"]]
    return [f"<p>{_text(said)}.</p>", *([_items(turns)] if turns else [])]


def _picture(file: Path, text: str) -> str:
    content = base64.b64encode(file.read_bytes()).decode()
    return f'<p><img alt="{_text(text)}" src="data:image/png;base64,{content}"></p>'


def _items(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    shown = "".join(f"<th>{_text(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{shown}</tr>\n{body}</table>"


def _cell(value: Any) -> str:
    return f'<td class="number">{_text(value)}</td>'


def _nats(value: float) -> str:
    return f"{value:.4f}"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"


def _text(value: Any) -> str:
    return escape(printable(str(value)))
