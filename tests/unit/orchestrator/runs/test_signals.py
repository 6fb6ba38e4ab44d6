from __future__ import annotations

import logging
import os
import signal
import threading

import pytest

from bim.orchestrator.runs.signals import interrupted_by_signals, stop_on_signals
from bim.orchestrator.training.callbacks import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    stop, before = StopRequest(), signal.getsignal(number)
    with stop_on_signals(stop), caplog.at_level(logging.INFO, "bim"):
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
        assert caplog.messages == [
            f"{number.name}: finishing the steps under way, then saving; once more stops at once"
        ]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_where_nothing_can_be_finished_the_first_signal_interrupts_and_is_named(
    number: signal.Signals,
) -> None:
    stop, before = StopRequest(), signal.getsignal(number)
    with interrupted_by_signals(stop), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert stop.reason == number.name
    assert signal.getsignal(number) == before


def test_outside_the_main_thread_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def elsewhere() -> None:
        with stop_on_signals(StopRequest()):
            assert signal.getsignal(signal.SIGTERM) == before

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
