"""Pictures of reconstructions: all depths of the same images under the same mask, at every call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bim.models.backbones.backbone import Backbone
from bim.models.masks.sampling import SAMPLERS
from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.jobs import reconstructions as module
from bim.orchestrator.jobs.reconstructions import (
    BORROWED,
    _title,
    picture_images,
    picture_plans,
    reconstruct,
    save_all_reconstructions,
    save_reconstruction_grid,
)
from bim.orchestrator.reporting.figures.reconstruction import (
    THROWN_NOTE,
    VEILED_NOTE,
    reconstruction_grid,
)
from bim.orchestrator.training.build import build_local_mim, mask_plans, open_spec_backbone
from bim.orchestrator.training.spec import DecoderSpec, PretrainSpec, TargetSpec


def small_spec(
    ratios: tuple[float, float] = (0.5, 0.5), thrown: tuple[float, float] = (0.0, 0.0), **changes: Any
) -> PretrainSpec:
    sampler = changes.pop("sampler", "furthest")
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    decoders = tuple(DecoderSpec(1, 32, 2, throw_ratio=ratio, sampler=sampler) for ratio in thrown)
    return PretrainSpec("vit_tiny_patch16_224", args, (1, 1), ratios, decoders, seed=3, **changes)


def opened(spec: PretrainSpec) -> tuple[Backbone, list[dict[str, Tensor]], EvalInputs]:
    backbone = open_spec_backbone(spec)
    weights = [build_local_mim(spec, k, backbone).state_dict() for k in range(2)]
    splits = Splits(np.arange(20), np.arange(0), np.arange(100, 140))
    inputs = EvalInputs(
        DigitsSource(), splits, (16, 16), spec.mean, spec.std, torch.device("cpu"), EvalConfig()
    )
    return backbone, weights, inputs


def headings(spec: PretrainSpec) -> list[str]:
    backbone, weights, inputs = opened(spec)
    figure = reconstruction_grid(reconstruct(spec, backbone, weights, inputs, {}), "title")
    return [text.get_text() for text in figure.texts]


def test_the_grid_shows_six_images_and_every_depth_under_one_mask(tmp_path: Path) -> None:
    spec = small_spec()
    backbone, weights, inputs = opened(spec)
    by_depth = reconstruct(spec, backbone, weights, inputs, {})
    assert list(by_depth) == [1, 2]
    assert len(by_depth[1].original) == 6
    assert np.array_equal(by_depth[1].masked_input, by_depth[2].masked_input)
    texts = headings(spec)
    assert texts[:5] == ["title", "original", "masked", "depth 1", "depth 2"]
    assert " ".join(texts[5:]) == BORROWED
    assert save_reconstruction_grid(spec, backbone, weights, inputs, tmp_path / "new" / "e.png", {}, "t")
    assert (tmp_path / "new" / "e.png").stat().st_size > 1000


def test_another_checkpoint_is_shown_by_the_same_images_and_mask() -> None:
    spec = small_spec()
    backbone, weights, inputs = opened(spec)
    later = [{name: value + 0.1 for name, value in state.items()} for state in weights]
    first, second = (reconstruct(spec, backbone, w, inputs, {})[2] for w in (weights, later))
    assert np.array_equal(first.masked_input, second.masked_input)
    assert not np.array_equal(first.predicted, second.predicted)
    assert picture_images(inputs).tolist() == [100, 107, 115, 123, 131, 139]


def test_masks_that_grow_with_the_depth_are_nested_and_shown_as_one_with_a_veil() -> None:
    spec = small_spec((0.5, 0.75))
    texts = headings(spec)
    assert texts[1:5] == ["original", "masked", "depth 1", "depth 2"]
    assert VEILED_NOTE in " ".join(texts[5:])
    assert VEILED_NOTE not in " ".join(headings(small_spec()))
    backbone, weights, inputs = opened(spec)
    by_depth = reconstruct(spec, backbone, weights, inputs, {})
    for shallow, deep in zip(by_depth[1].masked, by_depth[2].masked, strict=True):
        assert set(shallow) < set(deep)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("recovery", ["none", "aggregate"])
def test_depths_that_throw_as_many_patches_throw_the_same_ones(sampler: str, recovery: str) -> None:
    spec = small_spec(thrown=(0.25, 0.25), sampler=sampler)
    spec = replace(spec, decoders=tuple(replace(decoder, recovery=recovery) for decoder in spec.decoders))
    backbone, weights, inputs = opened(spec)
    first, second = reconstruct(spec, backbone, weights, inputs, {}).values()
    assert first.thrown is not None
    assert second.thrown is not None
    assert np.array_equal(first.masked, second.masked)
    assert np.array_equal(first.thrown, second.thrown)
    assert np.array_equal(first.masked_input, second.masked_input)
    assert first.thrown.shape == ((6, 4) if recovery == "none" else (6, 0))
    assert (THROWN_NOTE in first.notes) == (recovery == "none")


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_depth_that_throws_more_throws_what_the_others_throw(sampler: str) -> None:
    spec = small_spec(thrown=(0.25, 0.375), sampler=sampler)
    backbone, weights, inputs = opened(spec)
    by_depth = reconstruct(spec, backbone, weights, inputs, {})
    fewer, more = (by_depth[depth].thrown for depth in (1, 2))
    assert fewer is not None
    assert more is not None
    for of_first, of_second in zip(fewer, more, strict=True):
        assert set(of_first) < set(of_second)
    texts = headings(spec)
    assert texts[1:5] == ["original", "masked", "depth 1", "depth 2"]


def test_a_depth_that_throws_nothing_is_no_part_of_the_note_about_thrown_patches() -> None:
    texts = " ".join(headings(small_spec(thrown=(0.25, 0.0))))
    assert f"{THROWN_NOTE} (depth 1)" in texts


def test_the_masks_of_the_picture_are_those_of_the_first_step_where_nothing_is_thrown() -> None:
    spec = small_spec((0.5, 0.75))
    backbone = open_spec_backbone(spec)
    shown = picture_plans(spec, backbone, (16, 16), 6)
    trained = mask_plans(spec, backbone, (16, 16), 6, step=0, micro_step=0)
    for k in (0, 1):
        assert torch.equal(shown[k].masked, trained[k].masked)
        assert torch.equal(shown[k].keep, trained[k].keep)


@pytest.mark.parametrize(
    ("target", "note"),
    [
        (TargetSpec("pixels", {"normalize": True}), BORROWED),
        (TargetSpec("pixels", {"normalize": False}), ""),
        (TargetSpec("hog", {"cell": 4}), ""),
    ],
)
def test_a_note_names_what_is_borrowed_where_the_target_has_no_mean(target: TargetSpec, note: str) -> None:
    texts = headings(small_spec(targets=(target, target)))
    depths = ["depth 1", "depth 2"]
    columns = ["original", "masked", *(["target"] if target.name == "hog" else []), *depths]
    assert texts[1 : len(columns) + 1] == columns
    assert " ".join(texts[len(columns) + 1 :]) == note


def test_an_evaluation_writes_a_picture_of_all_depths_and_one_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, titles = small_spec(), list[str]()
    backbone, weights, inputs = opened(spec)
    for name in ("reconstruction_figure", "reconstruction_grid"):
        drawn = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda images, title, f=drawn: titles.append(title) or f(images, title)
        )
    paths = save_all_reconstructions(spec, backbone, weights, inputs, tmp_path, {}, "run")
    assert {Path(path).name for path in paths.values()} == {
        "reconstruction_depth01.png",
        "reconstruction_depth02.png",
    }
    assert (tmp_path / "reconstructions.png").exists()
    images = "6 test images of digits, 50% of the patches masked"
    assert titles == [f"run: {images}", f"run, depth 1: {images}", f"run, depth 2: {images}"]


def test_the_title_tells_how_many_patches_are_predicted_where_some_are_thrown() -> None:
    spec = small_spec(thrown=(0.25, 0.25))
    backbone, weights, inputs = opened(spec)
    title = _title("run", reconstruct(spec, backbone, weights, inputs, {}), inputs)
    assert (
        title == "run: 6 test images of digits, 50% of the patches masked, 25% predicted and the rest thrown"
    )
