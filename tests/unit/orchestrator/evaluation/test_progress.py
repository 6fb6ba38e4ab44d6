"""Progress of an evaluation goes to the listener of the surrounding context alone."""

from __future__ import annotations

import pytest

from bim.orchestrator.evaluation.progress import part, report, report_again, reported_to


def test_reports_name_their_part_and_end_with_the_block() -> None:
    told: list[str] = []
    report("no listener yet")
    with reported_to(told.append):
        report("costs")
        with part("trained models"), part("the test split"):
            report("64 of 359 images")
    report("no listener left")
    assert told == ["costs", "trained models, the test split: 64 of 359 images"]


def test_a_listener_can_end_the_evaluation() -> None:
    def refuse(text: str) -> None:
        raise InterruptedError(text)

    with reported_to(refuse), pytest.raises(InterruptedError, match="costs"):
        report("costs")


def test_a_long_step_says_again_what_was_said_last() -> None:
    told: list[str] = []
    report_again()
    with reported_to(told.append):
        report_again()
        with part("the test split"):
            report("64 of 359 images")
        report_again()
    with reported_to(told.append):
        report_again()
    assert told == ["", "the test split: 64 of 359 images", "the test split: 64 of 359 images", ""]
