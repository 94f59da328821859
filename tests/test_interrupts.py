"""Signals: which error they raise, and that they wait where nothing may be left half done."""

import os
import signal
import sys
import threading

import pytest

from lmc_fast.interrupts import Interrupted, interrupt_on_signals, number_of, uninterrupted


@pytest.fixture(autouse=True)
def handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_becomes_an_interruption_that_knows_it(number):
    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt) as caught:
        os.kill(os.getpid(), number)
    assert number_of(caught.value) == number and not str(caught.value)
    assert number_of(KeyboardInterrupt()) == signal.SIGINT


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt_on_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_a_finalizer_is_not_lost(number, monkeypatch, capsys):
    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), number)
            raise AssertionError("not interrupted")

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    interrupt_on_signals()
    interrupt_on_signals()
    Finalized()
    with pytest.raises(KeyboardInterrupt) as caught:
        threading.Event().wait(60)
    assert number_of(caught.value) == number and "Traceback" not in capsys.readouterr().err


def test_signals_wait_for_what_must_not_be_left_half_done():
    interrupt_on_signals()
    done = []
    with pytest.raises(Interrupted) as caught, uninterrupted():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("inner")
        os.kill(os.getpid(), signal.SIGHUP)  # one is enough
        done.append("outer")
    assert done == ["inner", "outer"] and caught.value.number == signal.SIGTERM
    with pytest.raises(Interrupted):  # as before
        os.kill(os.getpid(), signal.SIGHUP)


def test_errors_pass_and_handlers_come_back():
    interrupt_on_signals()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_nothing_changes():
    seen = []

    def work():
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
