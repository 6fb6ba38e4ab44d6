import pytest

from bim.orchestrator.evaluation.metric_info import COST, METRICS, QUALITY, same_scale
from bim.orchestrator.evaluation.records import DepthReport


def test_every_metric_of_a_report_is_in_the_table() -> None:
    report = DepthReport(2, 1, 1.0, 1.0, 1.0, 0.5, 0.5, 0.1, 0.1, rankme=3.0)
    assert {key for key in report.metrics() if not key.endswith("_se")} == METRICS.keys()
    assert [info.key for info in (*QUALITY, *COST)] == list(METRICS)


@pytest.mark.parametrize(
    ("key", "value", "error", "cell"),
    [
        ("knn_top1", 0.9124, 0.0149, "91.2±1.5"),
        ("linear_top1", 1.0, 0.0, "100±0.0"),
        ("knn_top1", 0.5, None, "50.0"),
        ("rankme", 31.26, None, "31.3"),
        ("params", 85_800_000.0, None, "85.8 M"),
        ("latency_b1_ms", 1.234, None, "1.23"),
        ("gflops", None, None, "-"),
    ],
)
def test_a_cell_shows_per_cent_and_standard_error_of_an_accuracy_and_other_values_as_they_are(
    key: str, value: float | None, error: float | None, cell: str
) -> None:
    assert METRICS[key].cell({key: value, f"{key}_se": error}) == cell


def test_accuracies_share_an_axis_and_the_rank_has_its_own() -> None:
    assert [info.key for info in same_scale("knn_top1")] == ["knn_top1", "linear_top1"]
    assert [info.key for info in same_scale("rankme")] == ["rankme"]
