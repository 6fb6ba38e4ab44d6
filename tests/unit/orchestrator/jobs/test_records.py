from __future__ import annotations

import pytest

from bim.orchestrator.evaluation.records import EvaluationResult
from bim.orchestrator.jobs.record_variants import NAMED_BAD_IMAGES, report_bad_images


def evaluation(count: int) -> EvaluationResult:
    bad = {f"{number}.png": "it is empty (0 bytes)" for number in range(count)}
    return EvaluationResult((), (), {}, {}, {}, bad)


@pytest.mark.parametrize("count", [0, 1, NAMED_BAD_IMAGES + 3])
def test_unreadable_images_of_an_evaluation_are_counted_and_named_in_one_line(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    report_bad_images(evaluation(count))
    assert len(caplog.messages) == (count > 0)
    if count:
        assert f"left out {count} unreadable image" in caplog.text
        assert "0.png (it is empty (0 bytes))" in caplog.text
        assert ("and 3 more" in caplog.text) == (count > NAMED_BAD_IMAGES)
