"""The README.md of an exported model: what it is, how to load it, how it was trained and evaluated.

Hugging Face's model card format (a YAML header, then Markdown), so that the folder can be uploaded as it is. States no
license, which is the choice of the owner of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from bim.models.backbones.backbone import Backbone
from bim.orchestrator.evaluation.features import MAX_IMAGES
from bim.orchestrator.evaluation.metric_info import COST, QUALITY, MetricInfo
from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.runs.provenance import CodeState, DataRecord
from bim.orchestrator.tables import render

TRAINING_KEYS = ("backbone", "blocks", "mask", "decoder", "target", "data", "schedule", "optim")
"""Settings that determine the weights; placement and tracking are left out."""

NOT_EVALUATED = EvaluationResult()


@dataclass(frozen=True)
class CardFacts:
    """Facts on the cards of all variants of a run.

    Args:
        run: name of the run.
        seed: of initial weights, masks, order and augmentation.
        settings: resolved settings as plain values, nested; the card shows `TRAINING_KEYS`.
        data: the images, with fingerprint and sizes of the splits; None if it was not recorded.
        code: revision of the code; None if unknown.
        init_from: weights that the run started from, as the user named them.
    """

    run: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: DataRecord | None = None
    code: CodeState | None = None
    init_from: str | None = None


def render_card(
    backbone: Backbone,
    depth: int,
    facts: CardFacts,
    size: tuple[int, int],
    evaluation: EvaluationResult = NOT_EVALUATED,
) -> str:
    """The card of the variant of `depth` layers for images of `size` (height, width), with the evaluation of all depths."""
    reports = evaluation.reports
    total = backbone.blocks[-1].depth
    architecture = backbone.name.partition(".")[0]
    sections = [
        _header(any(report.knn_top1 is not None for report in reports)),
        f"# {facts.run}: {architecture}, {depth} of {total} layers",
        _what_it_is(backbone, depth, facts),
        "## Use",
        _use(backbone, depth, size),
        "## Training",
        _training(facts),
    ]
    if reports:
        sections += ["## Evaluation", _evaluation(depth, evaluation)]
    siblings = [str(report.depth) for report in reports if report.depth != depth]
    if siblings:
        models = "a model" if len(siblings) == 1 else "models"
        sections += [
            "## Siblings",
            f"The same run trained {models} of {_join_and(siblings)} layers. All share their first layers, "
            "each with its own final norm: choose the depth that your hardware affords.",
        ]
    sections += [
        "## License",
        "Not stated. The publisher of these weights chooses one (`license:` in the header above) that respects the "
        "terms of the training images" + (" and of the weights it started from." if facts.init_from else "."),
    ]
    return "\n\n".join(sections) + "\n"


def _header(scored: bool) -> str:
    content: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": [
            "timm",
            "image-feature-extraction",
            "self-supervised-learning",
            "masked-image-modeling",
            "bim",
        ],
    }
    if scored:
        content["metrics"] = ["accuracy"]
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _what_it_is(backbone: Backbone, depth: int, facts: CardFacts) -> str:
    architecture, blocks = backbone.name.partition(".")[0], backbone.blocks
    used = [info for info in blocks if info.depth - info.layers < depth]
    module = backbone.registered_by
    model = f"timm's `{architecture}`" if module is None else f"`{architecture}` of the module `{module}`"
    start = f"from the weights of `{facts.init_from}`" if facts.init_from else "from random weights"
    text = f"An image encoder: the first {depth} layers of {model}, pretrained {start}, without labels, "
    if len(blocks) == 1:
        method = "MAE" if backbone.encode == "visible" else "SimMIM"
        text += f"by masked image modeling end to end ({method})"
        cut = depth < blocks[0].depth
        return text + (f" at {blocks[0].depth} layers, and cut to {depth} afterward." if cut else ".")
    blocks_used = (
        f"the first {len(used)} of {len(blocks)} blocks"
        if len(used) > 1
        else f"the first of {len(blocks)} blocks"
    )
    if len(used) == len(blocks):
        blocks_used = f"all {len(blocks)} blocks"
    norm = (
        "; its final norm is that of the decoder of the last one"
        if backbone.usage(depth).trained_norm
        else ""
    )
    return text + (
        "by block-wise masked image modeling (BIM): the layers are cut into blocks of "
        f"{_join_and([str(info.layers) for info in blocks])}, each with its own decoder and reconstruction loss "
        f"and no gradient between them. This model is {blocks_used}{norm}."
    )


def _use(backbone: Backbone, depth: int, size: tuple[int, int]) -> str:
    usage = backbone.usage(depth)
    more = [usage.sizes.format(size=f"{size[0]} x {size[1]}")]
    if usage.classifier:
        more.insert(0, "`num_classes=10` puts a new classifier on it to fine-tune")
    options = "; ".join(more)
    module, architecture = backbone.registered_by, backbone.name.partition(".")[0]
    registration = "" if module is None else f"import {module}  # registers {architecture} with timm\n"
    return f"""```python
import timm
{registration}
model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
x = transform(image).unsqueeze(0)  # PIL image -> (1, 3, {size[0]}, {size[1]})
embedding = {usage.call}  # (1, {usage.width})
```

The embedding is {usage.description}. In the same call {options}. Upload the folder to open it as `hf-hub:USER/NAME`."""


def _training(facts: CardFacts) -> str:
    lines = []
    if facts.data:
        data = facts.data
        held = f"{data.train:,} of {data.images:,} images; {data.val:,} for validation and {data.test:,} for test held out"
        lines.append(f"- Images: `{data.source}`, fingerprint `{data.fingerprint}`, {held}")
    if facts.init_from:
        lines.append(f"- Started from: `{facts.init_from}`")
    lines.append(f"- Seed: {facts.seed}")
    if facts.code and facts.code.commit:
        changed = " with uncommitted changes" if facts.code.dirty else ""
        lines.append(f"- Code: commit `{facts.code.commit}`{changed}")
    shown = {key: facts.settings[key] for key in TRAINING_KEYS if key in facts.settings}
    if shown:
        dumped = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=100)
        lines.append(f"\n```yaml\n{dumped}```")
    return "\n".join(lines)


def _evaluation(depth: int, evaluation: EvaluationResult) -> str:
    """A Markdown table of all depths, this one in bold, and how they were measured."""
    rows = []
    for report in evaluation.reports:
        row = {"layers": str(report.depth), **_cells(report.metrics(), (*COST, *QUALITY))}
        rows.append({key: f"**{cell}**" for key, cell in row.items()} if report.depth == depth else row)
    references: dict[str, Mapping[str, float]] = {
        f"{report.depth}, untrained": report.metrics() for report in evaluation.random
    }
    references |= {"raw pixels": evaluation.raw} if evaluation.raw else {}
    if any(metric.key in report.metrics() for report in evaluation.reports for metric in QUALITY):
        rows += [{"layers": name, **_cells(values, QUALITY)} for name, values in references.items()]
    return f"{render(rows, 'markdown')}\n\n{_measurement_note(evaluation.reports)}"


def _cells(values: Mapping[str, float], metrics: Sequence[MetricInfo]) -> dict[str, str]:
    """Heading -> cell of what was measured."""
    measured = [metric for metric in metrics if metric.key in values]
    return {m.heading if m.higher_is_better else m.name: m.cell(values) for m in measured}


def _measurement_note(reports: Sequence[DepthReport]) -> str:
    size = next((report.image_size for report in reports if report.image_size), None)
    num_test = max((report.n_test for report in reports), default=0)
    num_ranked = max((report.n_ranked for report in reports), default=0)
    text = "GFLOPs are 2 x multiply-accumulates of one image"
    text += f" of {size[0]} x {size[1]} pixels." if size else "."
    if any(report.latency_b1_ms is not None for report in reports):
        device = next((report.device for report in reports if report.device), "")
        text += " Milliseconds are the median of a batch of 1 and of 64" + (
            f" on {device}." if device else "."
        )
    if any(report.knn_top1 is not None for report in reports):
        text += (
            f" Accuracies are on {num_test:,} test images, ± one standard error: weighted nearest neighbors by cosine, and "
            "logistic regression on frozen, standardized embeddings, both fitted on the labels of the training images "
            f"(at most {MAX_IMAGES:,} of them)."
        )
    if num_ranked:
        text += (
            f" RankMe (arXiv 2210.02885) is the effective rank of the embeddings of {num_ranked:,} training images: more is "
            "better, at most the width of the embedding. The images have no labels, so there is no accuracy."
        )
    return text


def _join_and(words: Sequence[str]) -> str:
    """`2`, `2 and 4`, `2, 4 and 6`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
