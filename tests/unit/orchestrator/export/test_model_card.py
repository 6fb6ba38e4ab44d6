"""The card of an exported model: valid header, the facts, nothing invented."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from bim.models.backbones import Backbone, open_backbone
from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.export.model_card import CardFacts, render_card
from bim.orchestrator.runs.provenance import CodeState, DataRecord
from tests.snapshots import assert_snapshot

ARGS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 4}
FACTS = CardFacts(
    run="demo",
    seed=17,
    settings={
        "backbone": {"name": "vit_tiny_patch16_224", "model_args": ARGS},
        "mask": {"ratio": 0.75},
        "tracking": {"uri": "http://secret"},
    },
    data=DataRecord("digits", "0123abcd", images=1797, train=1258, val=180, test=359, classes=10),
    code=CodeState("c0ffee", dirty=True),
)
SIZE = (32, 32)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return open_backbone("vit_tiny_patch16_224", 2, ARGS)


def report(depth: int, knn: float | None = 0.9, rank: float | None = None) -> DepthReport:
    error = None if knn is None else 0.015
    return DepthReport(
        depth, 230_000, 0.0123, 0.81, 10.2, knn, knn, error, error, 359, SIZE, "CPU, 2 threads", rank,
        0 if rank is None else 1258,
    )  # fmt: skip


def header(card: str) -> dict[str, Any]:
    opening, content, _ = card.split("---\n", 2)
    assert opening == ""
    parsed: dict[str, Any] = yaml.safe_load(content)
    return parsed


def test_the_header_is_what_hugging_face_reads(backbone: Backbone) -> None:
    content = header(render_card(backbone, 2, FACTS, SIZE, EvaluationResult((report(2), report(4)))))
    assert content["library_name"] == "timm"
    assert content["pipeline_tag"] == "image-feature-extraction"
    assert content["metrics"] == ["accuracy"]
    assert {"timm", "masked-image-modeling"} <= set(content["tags"])


def test_no_license_is_invented(backbone: Backbone) -> None:
    card = render_card(backbone, 2, FACTS, SIZE)
    assert "license" not in header(card)
    assert "Not stated." in card


def test_the_card_holds_settings_seed_data_and_code(backbone: Backbone) -> None:
    card = render_card(backbone, 2, FACTS, SIZE)
    assert "- Seed: 17" in card
    assert "`digits`, fingerprint `0123abcd`, 1,258 of 1,797 images" in card
    assert "commit `c0ffee` with uncommitted changes" in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings == {
        "backbone": {"name": "vit_tiny_patch16_224", "model_args": ARGS},
        "mask": {"ratio": 0.75},
    }


def test_where_a_run_was_recorded_stays_private(backbone: Backbone) -> None:
    assert "secret" not in render_card(backbone, 2, FACTS, SIZE)


def test_the_card_reads_like_its_snapshot(backbone: Backbone) -> None:
    raw = {"knn_top1": 0.98, "knn_top1_se": 0.007, "linear_top1": 0.966, "linear_top1_se": 0.01}
    evaluation = EvaluationResult((report(2), report(4)), (report(2, 0.7),), raw)
    card = render_card(backbone, 4, FACTS, SIZE, evaluation)
    assert_snapshot("model_card", card)


def test_without_labels_the_card_has_no_accuracy_but_rankme(backbone: Backbone) -> None:
    card = render_card(backbone, 2, FACTS, SIZE, EvaluationResult((report(2, None), report(4, None))))
    assert "metrics" not in header(card)
    assert "kNN" not in card
    assert "RankMe" not in card
    assert "GFLOPs" in card

    ranked = (report(2, None, 12.34), report(4, None, 20.0))
    card = render_card(backbone, 2, FACTS, SIZE, EvaluationResult(ranked, (report(2, None, 5.0),)))
    assert "metrics" not in header(card)
    assert "kNN" not in card
    assert_snapshot("model_card_rankme", card[card.index("## Evaluation") :])


def test_the_card_distinguishes_blocks_from_one_run_end_to_end(backbone: Backbone) -> None:
    assert "This model is the first of 2 blocks" in render_card(backbone, 2, FACTS, SIZE)
    assert "This model is all 2 blocks" in render_card(backbone, 4, FACTS, SIZE)
    whole = open_backbone("vit_tiny_patch16_224", 1, ARGS)
    assert "end to end (MAE) at 4 layers, and cut to 2 afterward" in render_card(whole, 2, FACTS, SIZE)
    assert "end to end (MAE)." in render_card(whole, 4, FACTS, SIZE)


def test_weights_that_the_run_started_from_are_named(backbone: Backbone) -> None:
    facts = CardFacts("demo", 0, init_from="vit_tiny_patch16_224.augreg_in21k")
    card = render_card(backbone, 2, facts, SIZE)
    assert "from the weights of `vit_tiny_patch16_224.augreg_in21k`" in card
    assert "terms of the training images and of the weights it started from" in card


def test_the_card_names_the_norm_of_the_embedding(backbone: Backbone) -> None:
    assert "the mean of the patch tokens after the final norm" in render_card(backbone, 2, FACTS, SIZE)
    resnet = open_backbone("resnet18", 4, {"img_size": 32, "layers": [1, 1, 1, 1]})
    shallow, whole = (render_card(resnet, depth, FACTS, SIZE) for depth in (2, 4))
    for card in (shallow, whole):
        assert "The decoder's norm has no place in this model and is left out" in card
        assert "its final norm" not in card
        assert "any size that is a multiple of" in card
    assert "embedding = model(x)[0].mean(dim=(2, 3))  # (1, 128)" in shallow
    assert "embedding = model(x)  # (1, 512)" in whole
    assert "num_classes" in whole
    assert "num_classes" not in shallow.split("## Training")[0]


def test_an_end_to_end_run_over_all_tokens_is_not_called_mae() -> None:
    painted = open_backbone("vit_tiny_patch16_224", 1, ARGS, encode="all")
    assert "end to end (SimMIM)." in render_card(painted, 4, FACTS, SIZE)
