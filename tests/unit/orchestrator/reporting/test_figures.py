"""Figures: pixels of reconstructions, the series that are drawn, and labels that do not overlap."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.reporting.figures.accuracy import accuracy_latency_figure
from bim.orchestrator.reporting.figures.loss_curves import loss_curves_figure
from bim.orchestrator.reporting.figures.pareto import pareto_figure
from bim.orchestrator.reporting.figures.reconstruction import (
    CHECKERS,
    GRAY,
    GRID_SIDES,
    MIN_IMAGE_PX,
    THROWN_NOTE,
    VEIL,
    VEILED_NOTE,
    Reconstructions,
    reconstruction_figure,
    reconstruction_grid,
)
from bim.orchestrator.reporting.figures.style import write_png
from bim.orchestrator.reporting.figures.tiles import GAP_PX
from bim.orchestrator.search.results import SearchResult, TrialRow, TrialScore

RAW = {"knn_top1": 0.98, "knn_top1_se": 0.007, "linear_top1": 0.966, "linear_top1_se": 0.01}


def report(
    depth: int, accuracy: float | None = 0.9, latency: float | None = 1.0, rank: float | None = None
) -> DepthReport:
    error = None if accuracy is None else 0.015
    return DepthReport(
        depth,
        1000,
        0.01 * depth,
        latency,
        latency,
        accuracy,
        accuracy,
        error,
        error,
        360,
        (32, 32),
        "CPU, 2 threads",
        rank,
    )


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def depth_labels(axes: Axes) -> list[str]:
    (upper,) = axes.child_axes
    return [text.get_text() for text in upper.get_xticklabels()]


def test_masked_units_are_gray_and_the_others_untouched() -> None:
    images = np.random.default_rng(0).random((2, 4, 6, 3))
    masked = np.array([[0, 5], [1, 2]])
    figure = reconstruction_figure(Reconstructions(images, np.ones_like(images), masked, (2, 3)))
    canvas = np.asarray(figure.axes[0].images[0].get_array())
    scale = -(-MIN_IMAGE_PX // 6)
    second_row, second_column = 4 * scale + GAP_PX, 6 * scale + GAP_PX
    hidden, filled = (canvas[:, left : left + 6 * scale : scale] for left in (0, second_column))
    for shown, value in ((hidden, GRAY), (filled, 1.0)):
        first, second = shown[: 4 * scale : scale], shown[second_row::scale][:4]
        assert (first[0:2, 0:2] == value).all()  # unit 0, of 2 x 2 pixels
        assert (first[2:4, 4:6] == value).all()  # unit 5
        assert (second[0:2, 2:6] == value).all()  # units 1 and 2
        assert np.array_equal(first[0:2, 2:6], images[0, 0:2, 2:6])
        assert np.array_equal(second[2:4], images[1, 2:4])


def color_counts(path: Path) -> tuple[int, int, int]:
    """Red, blue and gray pixels of a picture."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    red, blue, gray = (
        int((pixels == color).all(axis=1).sum()) for color in ((255, 0, 0), (0, 0, 255), (127, 127, 127))
    )
    return red, blue, gray


@pytest.mark.parametrize(
    ("thrown", "red_units", "gray_units"), [(None, 3 + 3 + 4, 1), (np.array([[1, 2]]), 1 + 1 + 4, 3)]
)
def test_the_picture_shows_masked_reconstructed_and_original_side_by_side(
    tmp_path: Path, thrown: np.ndarray | None, red_units: int, gray_units: int
) -> None:
    original, predicted = np.zeros((1, 8, 8, 3)), np.full((1, 8, 8, 3), -0.5)
    original[..., 0] = 1.0  # red
    predicted[..., 2] = 7.0  # blue, far out of range
    path = tmp_path / "new" / "r.png"
    images = Reconstructions(original, predicted, np.array([[0]]), (2, 2), thrown=thrown)
    write_png(reconstruction_figure(images, "a title"), path)
    assert [file.name for file in path.parent.iterdir()] == ["r.png"]
    red, blue, gray = color_counts(path)
    assert blue**0.5 % 1 == 0  # one square unit of whole pixels is predicted, in the second of three columns
    assert red == red_units * blue
    assert gray_units * blue <= gray < gray_units * blue + 200  # the edges of letters are gray too


def test_the_masked_images_of_all_depths_veil_what_the_deeper_ones_do_not_see() -> None:
    original, predicted = np.full((1, 2, 6, 3), 1.0), np.zeros((1, 2, 6, 3))
    grid = {
        depth: Reconstructions(original, predicted, np.array([masked]), (1, 3))
        for depth, masked in ((2, [0]), (4, [0, 1]))
    }
    figure = reconstruction_grid(grid, "title")
    canvas = np.asarray(figure.axes[0].images[0].get_array())
    scale = -(-GRID_SIDES[0] // 6)
    left = 6 * scale + GAP_PX
    masked = canvas[0, left + scale : left + 6 * scale : 2 * scale, 0]
    assert masked.tolist() == pytest.approx([GRAY, VEIL * GRAY + 1 - VEIL, 1.0])
    texts = [text.get_text() for text in figure.texts]
    assert texts[:5] == ["title", "original", "masked", "depth 2", "depth 4"]
    assert " ".join(texts[5:]) == VEILED_NOTE


@pytest.mark.parametrize("target", [None, np.ones((1, 4, 6, 3))])
def test_thrown_units_are_checkered_among_the_predictions_and_the_note_says_so(
    target: np.ndarray | None,
) -> None:
    images = np.full((1, 4, 6, 3), 0.9)
    thrown = Reconstructions(
        images, np.ones_like(images), np.array([[0]]), (2, 3), target, thrown=np.array([[4]])
    )
    assert (thrown.masked_input[0, 0:2, 0:2] == GRAY).all()
    assert (thrown.masked_input[0, 2:4, 2:4] == GRAY).all()
    dark, light = CHECKERS
    assert thrown.reconstructed[0, 2:4, 2:4, 0].tolist() == [[dark, light], [light, dark]]
    assert (thrown.reconstructed[0, 0:2, 0:2] == 1).all()
    assert (thrown.reconstructed[0, 0:2, 2:6] == (0.9 if target is None else GRAY)).all()
    texts = [text.get_text() for text in reconstruction_figure(thrown, "title").texts]
    assert THROWN_NOTE in " ".join(texts)


def test_a_target_that_is_not_pixels_has_a_column_of_its_own() -> None:
    images = np.zeros((1, 8, 8, 3))
    hog = Reconstructions(images, images, np.array([[0]]), (2, 2), target=np.ones((1, 8, 8, 3)))
    figure = reconstruction_figure(hog, "title")
    assert {text.get_text() for text in figure.texts} == {
        "masked",
        "predicted",
        "target",
        "original",
        "title",
    }


def test_all_series_are_at_the_latency_of_the_trained_depth() -> None:
    trained = (report(2, 0.9, 1.5), report(4, 0.92, 3.0))
    random = (report(2, 0.7, None), report(4, 0.71, None))
    baseline = [report(2, 0.88, 1.6), report(4, 0.9, 2.9)]
    figure = accuracy_latency_figure(EvaluationResult(trained, random, RAW), baseline)
    assert figure is not None
    assert legend(figure) == ["trained", "MAE cut to the depth", "random initialization", "raw pixels"]
    for axes in figure.axes:
        assert len(axes.containers) == 3
        for bars in axes.containers:
            assert list(bars.lines[0].get_xdata()) == [1.5, 3.0]  # type: ignore[attr-defined]
        assert depth_labels(axes) == ["2", "4"]
    (segment, _) = figure.axes[0].containers[0].lines[2][0].get_segments()  # type: ignore[attr-defined]
    assert segment[:, 1].tolist() == pytest.approx([88.5, 91.5])  # one standard error, in percent
    assert figure.get_supxlabel() == "latency of one image, ms (CPU, 2 threads)"


def test_depths_too_close_for_a_label_each_share_one_and_no_labels_overlap() -> None:
    latencies = [1.0, 1.01, 1.02, 1.5, 1.9, 1.94, 2.0]
    trained = tuple(report(d + 10, latency=x) for d, x in enumerate(latencies))
    figure = accuracy_latency_figure(EvaluationResult(trained))
    assert figure is not None
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert depth_labels(axes)[:2] == ["10, 11, 12", "13"]
        (upper,) = axes.child_axes
        boxes = [text.get_window_extent() for text in upper.get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_without_labels_the_figure_is_one_panel_of_rankme_over_gflops_if_nothing_was_timed() -> None:
    trained = (report(2, None, None, rank=31.0), report(4, None, None, rank=120.0))
    figure = accuracy_latency_figure(EvaluationResult(trained), trained)
    assert figure is not None
    (axes,) = figure.axes
    assert (axes.get_title(), figure.get_supxlabel()) == ("RankMe", "GFLOPs per image")
    assert legend(figure) == ["trained", "MAE cut to the depth"]
    bars = axes.containers[0]
    assert list(bars.lines[0].get_ydata()) == [31.0, 120.0]  # type: ignore[attr-defined]
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().y0 > axes.title.get_window_extent().y1


def test_without_accuracies_and_rankme_there_is_no_figure() -> None:
    assert accuracy_latency_figure(EvaluationResult((report(2, None),))) is None
    assert accuracy_latency_figure(EvaluationResult()) is None


def test_loss_curves_have_a_line_per_block_that_ignores_outliers_and_holes(tmp_path: Path) -> None:
    steps = range(400)
    curves = {b: [(s, 0.5 + 0.1 * b + 1 / (s + 10)) for s in steps] for b in range(3)}
    curves[1][200] = (200, float("nan"))
    curves[2][300] = (300, float("inf"))
    figure = loss_curves_figure(curves)
    (axes,) = figure.axes
    (key,) = [axes.get_legend()]
    assert key is not None
    assert [text.get_text() for text in key.get_texts()] == ["block 0", "block 1", "block 2"]
    low, high = axes.get_ylim()
    assert 0.4 < low < 0.5
    assert 0.75 < high < 0.9
    assert write_png(figure, tmp_path / "loss.png").stat().st_size > 0
    assert loss_curves_figure({0: [(0, float("nan"))], 1: []}).axes


def test_drawing_brings_no_pyplot_and_needs_no_display(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; "
        "from bim.orchestrator.reporting.figures.loss_curves import loss_curves_figure; "
        "from bim.orchestrator.reporting.figures.style import write_png; "
        "write_png(loss_curves_figure({0: [(0, 1.0), (1, 0.5)]}), Path(sys.argv[1])); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[4]
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "loss.png")], cwd=root, check=True)


def trial(
    number: int, score: float | None, gflops: float, status: str = "finished", epoch: int = 4
) -> TrialRow:
    curve = () if score is None else (TrialScore(epoch, score, {2: score}),)
    return TrialRow(number, {}, status, "", curve, gflops)  # type: ignore[arg-type]


def test_the_pareto_figure_names_every_trial_and_joins_the_front() -> None:
    rows = (
        trial(0, 0.5, 2.0), trial(1, 0.6, 1.0), trial(2, 0.4, 0.5), trial(3, 0.9, 1.5, "stopped early", 2),
        trial(4, None, 1.0, "failed"),
    )  # fmt: skip
    figure = pareto_figure(SearchResult("knn_top1", 100, 4, {}, rows=rows))
    assert figure is not None
    (axes,) = figure.axes
    names = {text.get_text() for text in axes.texts}
    assert names == {"trial 0, baseline config", "trial 1, best", "trial 2", "trial 3, 2 of 4 epochs"}
    (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert list(line.get_xdata()) == [0.5, 1.0]
    assert list(line.get_ydata()) == [40.0, 60.0]
    assert len(axes.containers) == 4  # a bar of the standard error for every trial with a score
    assert legend(figure) == ["finished (3)", "stopped early (1)"]
    cut_off = (trial(5, 0.3, 1.1, "failed", 1), trial(6, 0.2, 1.2, "running", 1))
    figure = pareto_figure(SearchResult("knn_top1", 100, 4, {}, rows=(*rows, *cut_off)))
    assert figure is not None
    assert legend(figure) == ["finished (3)", "stopped early (1)", "failed (1)", "running (1)"]
    nothing = SearchResult("knn_top1", 100, 4, {}, rows=(trial(0, None, 1.0, "failed"),))
    assert pareto_figure(nothing) is None
