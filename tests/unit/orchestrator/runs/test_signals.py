"""What signals do in every phase, in this process and in commands that are scripts of a few lines."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import psutil
import pytest

from bim.orchestrator.runs import signals
from bim.orchestrator.runs.signals import exit_status, interrupted_by_signals, stop_on_signals
from bim.orchestrator.signal_masks import HANDLED_SIGNALS, STOP_SIGNALS, kept_signal_handlers
from bim.orchestrator.training.callbacks import StopRequest

ENDING = [number for number in STOP_SIGNALS if number != signal.SIGUSR2]


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # the handler runs here at the latest


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=str)
def test_the_first_signal_asks_and_the_second_interrupts(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    stop, before = StopRequest(), signal.getsignal(number)
    with stop_on_signals(stop), caplog.at_level(logging.INFO, "bim"):
        send(number)
        assert stop.reason == number.name
        limit = "" if number == signal.SIGUSR2 else " (at most 15 s)"
        assert caplog.messages == [f"{number.name}: saving a checkpoint{limit}; once more stops at once"]
        with pytest.raises(KeyboardInterrupt):
            send(number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=str)
def test_where_nothing_can_be_finished_the_first_signal_interrupts_and_is_named(
    number: signal.Signals,
) -> None:
    stop, before = StopRequest(), signal.getsignal(number)
    with interrupted_by_signals(stop), pytest.raises(KeyboardInterrupt):
        send(number)
    assert stop.reason == number.name
    assert signal.getsignal(number) == before


def test_a_handler_that_is_not_pythons_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program that embeds Python; `signal.getsignal` gives None for it, which `signal.signal` does not take."""
    actual, before = signal.getsignal, signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(
        signal, "getsignal", lambda number: None if number == signal.SIGHUP else actual(number)
    )
    for context in (
        interrupted_by_signals(StopRequest()),
        stop_on_signals(StopRequest()),
        kept_signal_handlers(),
    ):
        with context:
            assert actual(signal.SIGHUP) == before


def test_while_the_stages_start_a_signal_interrupts_and_while_they_train_it_asks() -> None:
    stop = StopRequest(can_save=False)
    with stop_on_signals(stop, interrupts_idle=True), pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)
    stop = StopRequest(can_save=True)
    with stop_on_signals(stop, interrupts_idle=True):
        send(signal.SIGTERM)
    assert stop.reason == "SIGTERM"


@pytest.mark.parametrize("number", ENDING, ids=str)
def test_a_checkpoint_that_takes_too_long_is_not_waited_for(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "SAVE_TIMEOUT_S", 0.1)
    start = time.monotonic()

    def commit() -> None:
        with stop_on_signals(StopRequest()):
            send(number)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        commit()
    assert time.monotonic() - start < 2
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_checkpoint_of_sigusr2_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAVE_TIMEOUT_S", 0.05)
    stop = StopRequest()
    with stop_on_signals(stop):
        send(signal.SIGUSR2)
        time.sleep(0.2)
    assert stop.reason == "SIGUSR2"


def test_sigusr1_asks_for_a_checkpoint_and_ends_nothing() -> None:
    stop = StopRequest()
    with stop_on_signals(stop):
        send(signal.SIGUSR1)
        send(signal.SIGUSR1)
    assert (stop.reason, stop.saves_requested) == (None, 2)
    with interrupted_by_signals(stop):
        send(signal.SIGUSR1)
    assert (stop.reason, stop.saves_requested) == (None, 2)


def test_what_sigusr1_does_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with stop_on_signals(StopRequest(), on_save="trials save by themselves"):
        send(signal.SIGUSR1)
    assert caplog.messages == ["SIGUSR1: trials save by themselves"]


def test_exit_statuses() -> None:
    assert [exit_status(number.name) for number in ENDING] == [130, 143, 129, 131]
    assert exit_status("SIGUSR2") == 75


def test_outside_the_main_thread_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def elsewhere() -> None:
        with stop_on_signals(StopRequest()):
            assert signal.getsignal(signal.SIGTERM) == before

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()


COMMAND = """
import subprocess, sys, time
from bim.orchestrator.runs import signals
from bim.orchestrator.runs.signals import at_forced_exit, command_signals, exit_status
from bim.orchestrator.training.callbacks import StopRequest

stop = StopRequest()
signals.SAVE_TIMEOUT_S = signals.CLOSE_TIMEOUT_S = 0.3
with command_signals(stop):
    try:
        {body}
    except KeyboardInterrupt:
        sys.exit(exit_status(stop.reason))
"""

DEAF = """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with at_forced_exit(lambda: print("last words", flush=True)), at_forced_exit(lambda: time.sleep(60)):
            while True:  # as a library does that catches everything
                try:
                    print("ready", child.pid, flush=True)
                    while True:
                        time.sleep(30)
                except KeyboardInterrupt:
                    pass
"""


def command(body: str, numbers: Sequence[int]) -> tuple[int, str, float]:
    """Run a command that prints when it is ready; -> exit status, output, seconds from the last signal to the end."""
    script = COMMAND.format(body=body.strip())
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)
        start = time.monotonic()
        output = first + process.stdout.read()
        return process.wait(), output, time.monotonic() - start


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=str)
def test_a_command_ends_with_the_status_of_the_signal(number: signal.Signals) -> None:
    status, _, seconds = command("print('ready', flush=True); time.sleep(60)", [number])
    assert status == exit_status(number.name)
    assert seconds < 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=str)
def test_a_command_that_does_not_obey_is_ended_with_its_children_after_a_second_signal(
    number: signal.Signals,
) -> None:
    status, output, seconds = command(DEAF, [number, number])
    assert status == exit_status(number.name)
    assert seconds < 3
    assert "last words" in output
    child = int(output.split()[1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_command_that_does_not_obey_is_ended_when_the_time_is_over() -> None:
    status, _, seconds = command(DEAF, [signal.SIGHUP])
    assert status == 129
    assert seconds < 3


def test_sigusr1_does_not_end_a_command() -> None:
    status, output, _ = command("print('ready', flush=True); time.sleep(0.5); print('end')", [signal.SIGUSR1])
    assert (status, output) == (0, "ready\nend\n")


def test_what_nohup_ignores_stays_ignored() -> None:
    script = COMMAND.format(body="print('ready', flush=True); time.sleep(0.5); print('end')")
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert process.stdout.read() == "end\n"
    assert process.returncode == 0


def test_every_signal_is_as_before_when_a_command_has_ended() -> None:
    before = [signal.getsignal(number) for number in HANDLED_SIGNALS]
    with signals.command_signals(StopRequest()):
        assert [signal.getsignal(number) for number in HANDLED_SIGNALS] != before
    assert [signal.getsignal(number) for number in HANDLED_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
