"""How progress is shown: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from ..pipeline.progress import Progress

LINE_SECONDS = 30.0  # at least, between two lines
_UNITS = {"learning": "step"}


class Display:
    """A `progress` callback. hidden: shows nothing.

    Without a terminal (nohup, CI) a log is what is read: one line at most every LINE_SECONDS, nothing is overwritten.
    """

    def __init__(self, hidden: bool = False):
        self._stage, self._unit = "", ""
        self._said, self._rate_from = time.monotonic(), (0, time.monotonic())
        self._hidden, self.bar = hidden, None
        if not hidden and sys.stderr.isatty():
            self.bar = tqdm(desc="starting", leave=False, dynamic_ncols=True, file=sys.stderr)

    def __call__(self, at: Progress) -> None:
        if at.stage != self._stage:
            self._begin(at)
        if self.bar is not None:
            self._draw(self.bar, at)
        elif not self._hidden and time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            parts = [f"{at.step:,} of {at.steps:,} {self._unit}s", *self._facts(at)]
            print(f"{at.stage}: {', '.join(parts)}", file=sys.stderr, flush=True)

    def _begin(self, at: Progress) -> None:
        self._stage, self._unit = at.stage, _UNITS.get(at.stage, "part")
        self._rate_from = at.step, time.monotonic()
        if self.bar is not None:
            self.bar.reset(at.steps)
            self.bar.initial = self.bar.n = at.step  # what an earlier run did says nothing of this one's pace
            self.bar.unit = self._unit
            self.bar.set_description(at.stage, refresh=False)

    def _draw(self, bar: tqdm, at: Progress) -> None:
        bar.total = at.steps
        bar.set_postfix_str(", ".join(self._facts(at)), refresh=False)
        if at.step == bar.n:
            bar.refresh()
        bar.update(at.step - bar.n)

    def _facts(self, at: Progress) -> list[str]:
        facts = [at.note] if at.note else []
        if at.loss is not None:
            facts.append(f"loss {at.loss:.3f}")
        if at.excess is not None:
            facts.append(f"validation excess {at.excess:.4f}")
        first, began = self._rate_from
        seconds = time.monotonic() - began
        if at.tokens and at.step > first and seconds > 0:
            facts.append(f"{at.tokens * (at.step - first) / seconds:,.0f} tokens/s")
        if at.eta is not None and at.step < at.steps:
            facts.append(f"about {show_seconds(at.eta)} left")
        return facts

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def show_seconds(seconds: float) -> str:
    """45 s, 12 min, 3.5 h, 2.1 days: as much as an estimate is worth."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
