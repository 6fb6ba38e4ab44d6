"""What a person reads while a search runs."""

from __future__ import annotations

from dataclasses import replace

from bim.orchestrator.reporting.search_console import SearchProgress, closing, opening
from bim.orchestrator.search.results import SearchResult, TrialRow, TrialScore
from bim.orchestrator.search.space import Choice, Range
from bim.orchestrator.text import wrapped

OWN = {"mask.ratio": 0.75, "optim.blr": 0.008}
EMPTY = SearchResult("knn_top1", 180, 12, OWN)


class Sink:
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.trials: list[tuple[int, str, int]] = []
        self.events: list[str] = []

    def log_trial(self, row: TrialRow, metric: str) -> None:
        self.trials.append((row.number, row.status, row.epoch))

    def log_event(self, text: str) -> None:
        self.events.append(text)


def row(number: int, ratio: float, *scores: float, **changes: str) -> TrialRow:
    curve = tuple(TrialScore(3 * (i + 1), score, {2: score}) for i, score in enumerate(scores))
    made = TrialRow(number, OWN | {"mask.ratio": ratio}, curve=curve)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_every_trial_is_followed_against_the_best_of_the_same_epoch() -> None:
    said: list[str] = []
    sink = Sink()
    progress = SearchProgress(said.append, sink)
    own, other = row(0, 0.75, 0.5), row(1, 0.6, 0.55)
    progress.on_begin(EMPTY.with_row(row(0, 0.75)), row(0, 0.75))
    progress.on_score(EMPTY.with_row(own), own)
    progress.on_begin(EMPTY.with_row(own).with_row(row(1, 0.6)), row(1, 0.6))
    both = EMPTY.with_row(own).with_row(other)
    progress.on_score(both, other)
    progress.on_score(both, own)
    progress.on_end(
        both, replace(other, status="stopped early", status_reason="by ASHA after epoch 3: too weak")
    )
    assert said == [
        "trial 0: baseline config",
        "trial 0  epoch  3/12  kNN top-1 0.500",
        "trial 1: mask.ratio 0.6",
        "trial 1  epoch  3/12  kNN top-1 0.550  best so far",
        "trial 0  epoch  3/12  kNN top-1 0.500  behind trial 1 (0.550)",
        "trial 1  stopped by ASHA after epoch 3: too weak",
    ]
    assert sink.trials[-1] == (1, "stopped early", 3)
    assert sink.events[-1] == "trial 1  stopped by ASHA after epoch 3: too weak"


def test_a_tie_is_called_one() -> None:
    said: list[str] = []
    own, other = row(0, 0.75, 0.5), row(1, 0.6, 0.5)
    SearchProgress(said.append, Sink()).on_score(EMPTY.with_row(own).with_row(other), other)
    assert said == ["trial 1  epoch  3/12  kNN top-1 0.500  level with trial 0 (0.500)"]


def test_what_was_not_trained_says_why() -> None:
    said: list[str] = []
    progress = SearchProgress(said.append, Sink())
    progress.on_end(
        EMPTY, row(2, 0.9, status="infeasible", status_reason="mask.ratio 0.9 leaves block 0 no visible unit")
    )
    progress.on_end(EMPTY, row(3, 0.6, status="failed", status_reason="the loss of block 0 is not finite"))
    assert said == [
        "trial 2  infeasible: mask.ratio 0.9 leaves block 0 no visible unit",
        "trial 3  failed: the loss of block 0 is not finite",
    ]


def test_a_trial_that_is_continued_says_so() -> None:
    said: list[str] = []
    SearchProgress(said.append, Sink()).on_begin(EMPTY, row(1, 0.6, 0.5))
    assert said == ["trial 1 goes on after epoch 3: mask.ratio 0.6"]


def test_the_opening_tells_how_long_it_may_take_and_what_is_tried() -> None:
    space = {
        "mask.ratio": Choice((0.75, 0.5, [0.6, 0.65, 0.7, 0.75])),
        "optim.blr": Range(1e-3, 1e-1, log=True, is_integer=False),
        "decoder.throw_ratio": Choice((0.0,)),
    }
    lines = opening(EMPTY, 6, space, trials=4, run_concurrently=2, at_most_s=100)
    text = " ".join(" ".join(lines).split())
    assert "4 trials of 12 epochs, 2 side by side, ranked by kNN top-1 of 180 validation images" in text
    assert "after 6 epochs at the soonest" in text
    assert "mask.ratio: 0.75 (the recipe's), 0.5, [0.6, 0.65, 0.7, 0.75]" in text
    assert "optim.blr: 0.008 (the recipe's), 0.001 to 0.1 by its logarithm" in text.replace(", by", " by")
    assert "decoder.throw_ratio: 0.0 (the recipe's), nothing else" in text
    assert lines[-1] == (
        "  it takes about 1 min 40 s or less if nothing else runs here; --search.trials 0 trains without it"
    )
    assert max(map(len, lines)) <= 98


def test_the_closing_tells_what_the_run_goes_on_with() -> None:
    own, better = row(0, 0.75, 0.5, 0.5, 0.5, 0.5), row(1, 0.6, 0.6, 0.6, 0.6, 0.6)
    result = EMPTY.with_row(replace(own, status="finished")).with_row(replace(better, status="finished"))
    lines = closing(result, 90, "runs/a/search/best.yaml")
    assert lines[0] == "search: 2 finished, in 1 min 30 s"
    assert " ".join(lines[1:3]).startswith("best: trial 1, mask.ratio 0.6: kNN top-1 0.600 (baseline 0.500, ")
    assert lines[-1] == "  as a recipe: runs/a/search/best.yaml"


def test_long_lines_are_broken_but_never_inside_a_list() -> None:
    text = "trial 2: mask.ratio 0.6, decoder.throw_ratio 0.5, schedule.resolution [[0, 16], [0.25, 24], [0.5, 32]]"
    lines = wrapped(text)
    assert [line.strip() for line in lines] == [
        "trial 2: mask.ratio 0.6, decoder.throw_ratio 0.5, schedule.resolution",
        "[[0, 16], [0.25, 24], [0.5, 32]]",
    ]
