from __future__ import annotations

import os
import signal
import threading

import pytest

from orchestrator.pretrain import StopRequest
from orchestrator.stop_signals import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    stop, said, before = StopRequest(), list[str](), signal.getsignal(number)
    with stop_on_signals(stop, said.append):
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_outside_the_main_thread_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def elsewhere() -> None:
        with stop_on_signals(StopRequest(), print):
            assert signal.getsignal(signal.SIGTERM) == before

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
