"""The card of an exported model: valid header, the facts, nothing invented."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from bim.models.backbones import Backbone, open_backbone
from bim.orchestrator.evaluation.records import DepthReport
from bim.orchestrator.export.model_card import CardFacts, render_card
from bim.orchestrator.runs.provenance import CodeState, DataRecord

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
    content = header(render_card(backbone, 2, FACTS, SIZE, [report(2), report(4)]))
    assert content["library_name"] == "timm"
    assert content["pipeline_tag"] == "image-feature-extraction"
    assert content["metrics"] == ["accuracy"]
    assert {"timm", "masked-image-modeling"} <= set(content["tags"])


def test_no_licence_is_invented(backbone: Backbone) -> None:
    card = render_card(backbone, 2, FACTS, SIZE)
    assert "license" not in header(card)
    assert "None is stated." in card


def test_the_card_tells_settings_seed_data_and_code(backbone: Backbone) -> None:
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


def test_the_table_shows_the_family_with_this_depth_in_bold(backbone: Backbone) -> None:
    raw = {"knn_top1": 0.98, "knn_top1_se": 0.007, "linear_top1": 0.966, "linear_top1_se": 0.01}
    lines = render_card(backbone, 4, FACTS, SIZE, [report(2), report(4)], [report(2, 0.7)], raw).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "| layers | parameters | GFLOPs | ms, batch 1 | ms, batch 64 | kNN top-1, % | linear top-1, % |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 2 | 0.230 M | 0.0123 | 0.810 | 10.2 | 90.0±1.5 | 90.0±1.5 |",
        "| **4** | **0.230 M** | **0.0123** | **0.810** | **10.2** | **90.0±1.5** | **90.0±1.5** |",
        "| 2, untrained |  |  |  |  | 70.0±1.5 | 70.0±1.5 |",
        "| raw pixels |  |  |  |  | 98.0±0.7 | 96.6±1.0 |",
    ]
    assert any("gave a model of 2 layers" in line for line in lines)


def test_without_labels_the_card_claims_no_accuracy_and_tells_the_rank(backbone: Backbone) -> None:
    card = render_card(backbone, 2, FACTS, SIZE, [report(2, None), report(4, None)])
    assert "metrics" not in header(card)
    assert "kNN" not in card
    assert "RankMe" not in card
    assert "GFLOPs" in card

    ranked = [report(2, None, 12.34), report(4, None, 20.0)]
    card = render_card(backbone, 2, FACTS, SIZE, ranked, [report(2, None, 5.0)])
    assert "metrics" not in header(card)
    assert "kNN" not in card
    assert [line for line in card.splitlines() if line.startswith("|")] == [
        "| layers | parameters | GFLOPs | ms, batch 1 | ms, batch 64 | RankMe |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        "| **2** | **0.230 M** | **0.0123** | **0.810** | **10.2** | **12.3** |",
        "| 4 | 0.230 M | 0.0123 | 0.810 | 10.2 | 20.0 |",
        "| 2, untrained |  |  |  |  | 5.0 |",
    ]
    assert (
        "RankMe (arXiv 2210.02885) is the effective rank of the embeddings of 1,258 training images" in card
    )


def test_how_it_was_trained_is_said_for_blocks_and_for_one_run_end_to_end(backbone: Backbone) -> None:
    assert "This model is the first of 2 blocks" in render_card(backbone, 2, FACTS, SIZE)
    assert "This model is all 2 blocks" in render_card(backbone, 4, FACTS, SIZE)
    whole = open_backbone("vit_tiny_patch16_224", 1, ARGS)
    assert "end to end (MAE) at 4 layers, and cut to 2 afterwards" in render_card(whole, 2, FACTS, SIZE)
    assert "end to end (MAE)." in render_card(whole, 4, FACTS, SIZE)


def test_weights_that_the_run_started_from_are_named(backbone: Backbone) -> None:
    facts = CardFacts("demo", 0, init_from="vit_tiny_patch16_224.augreg_in21k")
    card = render_card(backbone, 2, facts, SIZE)
    assert "from the weights of `vit_tiny_patch16_224.augreg_in21k`" in card
    assert "terms of the training images and of the weights it started from" in card


def test_the_card_says_which_norm_the_embedding_has_gone_through(backbone: Backbone) -> None:
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
