"""What is shown of progress: a bar on a terminal, a line now and then elsewhere."""

import io

import pytest

from lmc_fast.cli import progress as module
from lmc_fast.cli.progress import Display, show_seconds
from lmc_fast.pipeline.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def follow(display, clock, seconds):
    """A step a second."""
    with display:
        for step in range(seconds):
            display(Progress(step, seconds, loss=2.5, excess=0.01, tokens=64, eta=float(seconds - step)))
            clock[0] += 1


def test_without_a_terminal_a_line_every_half_minute(clock, capsys):
    follow(Display(), clock, 100)
    shown = capsys.readouterr()
    assert not shown.out and "\r" not in shown.err and "\x1b" not in shown.err
    assert shown.err.splitlines() == [
        f"learning: {step} of 100 steps, loss 2.500, validation excess 0.0100, 64 tokens/s, about {100 - step} s left"
        for step in (30, 60, 90)
    ]


def test_hidden_it_says_nothing(clock, capsys):
    follow(Display(hidden=True), clock, 100)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    with Display() as display:
        display(Progress(0, 48, stage="matching", note="round 1"))
        display(Progress(24, 48, stage="matching", note="round 2, 3 of 9 changed", eta=60.0))
        display(Progress(500, 1200, eta=5400.0))  # of a run that goes on
        bar = display.bar
        assert (bar.n, bar.initial, bar.total, bar.desc) == (500, 500, 1200, "learning: ")
    shown = terminal.getvalue()
    for words in ("matching", "round 2, 3 of 9", "about 60 s left", "500/1200", "about 1.5 h left"):
        assert words in shown, words


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (300, "5 min"), (5400, "1.5 h"), (3e5, "3.5 days")]
)
def test_times_are_shown(seconds, text):
    assert show_seconds(seconds) == text
