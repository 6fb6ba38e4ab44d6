from __future__ import annotations

from pathlib import Path

import pytest

from bim.orchestrator.benchmarks.ablation import (
    CASES,
    EXTRA_MEASUREMENTS,
    CaseResult,
    base_digest,
    read_results,
    run_case,
    table,
    write_result,
)
from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.transforms import end_to_end, with_changes
from bim.orchestrator.runs.resolve import resolve

RESULTS = Path(__file__).resolve().parents[4] / "docs" / "ablation.jsonl"


def result(case: str, seed: int, knn: list[float]) -> CaseResult:
    by_depth = dict(zip((2, 4), knn, strict=True))
    return CaseResult(case, seed, 40, {"knn_top1": by_depth, "linear_top1": by_depth}, 413, 1.0)


def test_results_come_back_as_they_were_written_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a" / "results.jsonl"
    first, second = result("bim", 0, [0.5, 0.6]), result("mae", 1, [0.4, 0.7])
    write_result(file, first)
    write_result(file, second)
    with file.open("a") as opened:
        opened.write('{"case": "noi')
    assert read_results(file) == [first, second]
    assert read_results(tmp_path / "none.jsonl") == []


def test_the_lead_is_the_mean_over_depths_paired_by_seed() -> None:
    found = [
        *(result("bim", seed, knn) for seed, knn in enumerate([[0.5, 0.6], [0.52, 0.64], [0.48, 0.58]])),
        *(result("mae", seed, knn) for seed, knn in enumerate([[0.4, 0.6], [0.42, 0.62], [0.44, 0.64]])),
    ]
    lines = list(table(found, {"bim": "plain", "mae": "the reference"}))
    assert lines[0].startswith("| knn top1, % | depth 2 | depth 4 | mean | ahead of MAE |")
    # Leads of the three seeds: 5, 6 and -1 points.
    assert lines[2] == "| plain | 50.0 ± 1.2 | 60.7 ± 1.8 | 55.3 ± 1.5 | +3.3 ± 2.2 |"
    assert lines[3] == "| the reference | 42.0 ± 1.2 | 62.0 ± 1.2 | 52.0 ± 1.2 |  |"


@pytest.mark.parametrize("case", CASES)
def test_every_case_can_be_built_from_the_recipe(case: str) -> None:
    base = load_settings(["--recipe", "sign_digits"])
    base = end_to_end(base) if case == "mae" else base
    resolve(with_changes(base, CASES[case][1]))


def test_cases_that_throw_tokens_name_their_recovery_and_published_results_still_count() -> None:
    thrown = {name: changes for name, (_, changes) in CASES.items() if "decoder.throw_ratio" in changes}
    assert {name: changes["decoder.recovery"] for name, changes in thrown.items()} == {
        "throw": "aggregate",
        "throw-light": "aggregate",
        "drop": "none",
    }
    published = {found.base for found in read_results(RESULTS) if found.epochs == 40}
    assert published == {base_digest(load_settings(["--recipe", "sign_digits", "--mask.ratio", "0.75"]))}


@pytest.mark.slow
def test_a_case_is_trained_and_measured_at_the_depths_of_the_family() -> None:
    base = load_settings(
        [
            *["--schedule.epochs", "1", "--schedule.warmup_epochs", "0", "--data.batch_size", "256"],
            *["--backbone.model_args.embed_dim", "24", "--backbone.model_args.depth", "4"],
        ]
    )
    for case in ("bim", "mae", "random", "no-network"):
        rows = run_case(base, case, seed=1)
        assert [found.case for found in rows] == [case, *EXTRA_MEASUREMENTS.get(case, ())]
        for found in rows:
            assert (found.seed, found.epochs, found.n_test) == (1, 1, 359)
            assert list(found.scores["knn_top1"]) == [1, 2, 3, 4]
    assert len(set(found.scores["knn_top1"].values())) == 1


def test_results_of_other_base_settings_are_told_apart() -> None:
    base = load_settings(["--recipe", "sign_digits"])
    same = load_settings(
        ["--recipe", "sign_digits", "--seed", "3", "--data.source", "/elsewhere/sign_digits"]
    )
    other = load_settings(["--recipe", "sign_digits", "--optim.blr", "2e-3"])
    assert base_digest(base) == base_digest(same)
    assert base_digest(base) != base_digest(other)
    scored_otherwise = with_changes(base, {"evaluation.knn_k": 5})
    assert base_digest(base) != base_digest(scored_otherwise)
