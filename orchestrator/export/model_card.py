"""The README.md of an exported model: what it is, how to load it, how it was trained and what it is worth.

Hugging Face's model card format (a YAML header, then Markdown), so that the folder can be uploaded as it is. Formats
facts that others gather; states no licence, since that is the choice of whoever owns the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from bim.models.backbones.backbone import Backbone
from bim.orchestrator.evaluation.features import MAX_IMAGES
from bim.orchestrator.evaluation.records import DepthReport
from bim.orchestrator.runs.provenance import CodeState, DataRecord
from bim.orchestrator.text import params_text, score_text, three_digits

TRAINING_KEYS = ("backbone", "blocks", "mask", "decoder", "target", "data", "schedule", "optim")
"""Settings that make the weights what they are; where they ran and were recorded is left out."""


@dataclass(frozen=True)
class CardFacts:
    """What the cards of one family share.

    Args:
        run: name of the run.
        seed: of initial weights, masks, order and augmentation.
        settings: resolved settings as plain values, nested; see `TRAINING_KEYS` for what is shown.
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
    reports: Sequence[DepthReport] = (),
    random_reports: Sequence[DepthReport] = (),
    raw: Mapping[str, float] | None = None,
) -> str:
    """The card of the variant of `depth` layers, built for images of `size`; reports are those of the whole family."""
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
        sections += ["## Evaluation", _evaluation(depth, reports, random_reports, raw or {})]
    siblings = [str(report.depth) for report in reports if report.depth != depth]
    if siblings:
        one = len(siblings) == 1
        sections += [
            "## Siblings",
            f"The same run gave {'a model' if one else 'models'} of {_listed(siblings)} layers. They share their first "
            "layers with this one, each with a final norm of its own: choose by what your hardware affords.",
        ]
    sections += [
        "## Licence",
        "None is stated. Whoever publishes these weights chooses one (`license:` in the header above), with an eye on the "
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
    start = f"from the weights of `{facts.init_from}`" if facts.init_from else "from random weights"
    text = f"An image encoder: the first {depth} layers of timm's `{architecture}`, pretrained {start}, without labels, "
    if len(blocks) == 1:
        method = "MAE" if backbone.encode == "visible" else "SimMIM"
        text += f"by masked image modelling end to end ({method})"
        cut = depth < blocks[0].depth
        return text + (f" at {blocks[0].depth} layers, and cut to {depth} afterwards." if cut else ".")
    share = (
        f"the first {len(used)} of {len(blocks)} blocks"
        if len(used) > 1
        else f"the first of {len(blocks)} blocks"
    )
    if len(used) == len(blocks):
        share = f"all {len(blocks)} blocks"
    norm = (
        "; its final norm is that of the decoder of the last one"
        if backbone.usage(depth).trained_norm
        else ""
    )
    return text + (
        "by block-wise masked image modelling (BIM): the layers are cut into blocks of "
        f"{_listed([str(info.layers) for info in blocks])}, each with a decoder and a reconstruction loss of its own "
        f"and no gradient between them. This model is {share}{norm}."
    )


def _use(backbone: Backbone, depth: int, size: tuple[int, int]) -> str:
    usage = backbone.usage(depth)
    more = [usage.sizes.format(size=f"{size[0]} x {size[1]}")]
    if usage.classifier:
        more.insert(0, "`num_classes=10` puts a new classifier on it to fine-tune")
    options = "; ".join(more)
    return f"""```python
import timm

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


def _evaluation(
    depth: int,
    reports: Sequence[DepthReport],
    random_reports: Sequence[DepthReport],
    raw: Mapping[str, float],
) -> str:
    """A Markdown table of the family, this depth in bold, and how it was measured."""
    scored = any(report.knn_top1 is not None for report in reports)
    timed = any(report.latency_ms_b1 is not None for report in reports)
    heads = ["layers", "parameters", "GFLOPs"]
    heads += ["ms, batch 1", "ms, batch 64"] if timed else []
    scores = {"knn_top1": "kNN top-1, %", "linear_top1": "linear top-1, %"} if scored else {}
    ranked = max((report.n_ranked for report in reports), default=0)
    scores |= {"rankme": "RankMe"} if ranked else {}
    heads += scores.values()
    lines = ["| " + " | ".join(heads) + " |", "|" + " ---: |" * len(heads)]

    def row(label: str, costs: Sequence[str], values: Mapping[str, float], bold: bool = False) -> str:
        cells = [label, *costs] + [""] * (len(heads) - 1 - len(costs) - len(scores))
        cells += [score_text(values, key) for key in scores]
        return "| " + " | ".join(f"**{cell}**" if bold and cell else cell for cell in cells) + " |"

    for report in reports:
        costs = [params_text(report.params), three_digits(report.gflops)]
        times = (report.latency_ms_b1, report.latency_ms_b64)
        costs += [three_digits(time) if time is not None else "-" for time in times] if timed else []
        lines.append(row(str(report.depth), costs, report.metrics(), bold=report.depth == depth))
    if scores:
        lines += [row(f"{report.depth}, untrained", [], report.metrics()) for report in random_reports]
        lines += [row("raw pixels", [], raw)] if raw else []
    return "\n".join(lines) + "\n\n" + _how_measured(reports, scored, timed, ranked)


def _how_measured(reports: Sequence[DepthReport], scored: bool, timed: bool, ranked: int) -> str:
    text = "GFLOPs are 2 x multiply-accumulates of one image"
    size = next((report.image_size for report in reports if report.image_size), None)
    text += f" of {size[0]} x {size[1]} pixels." if size else "."
    if timed:
        device = next((report.device for report in reports if report.device), "")
        text += " Milliseconds are the median of a batch" + (f" on {device}." if device else ".")
    if scored:
        text += (
            f" Accuracies are on {max(report.n_test for report in reports):,} test images, ± one standard error: weighted "
            "nearest neighbours by cosine, and logistic regression on frozen, standardised embeddings, both fitted on the "
            f"labels of the training images (at most {MAX_IMAGES:,} of them)."
        )
    if ranked:
        text += (
            f" RankMe (arXiv 2210.02885) is the effective rank of the embeddings of {ranked:,} training images: more is "
            "better, at most the width of the embedding. The images have no labels, so there is no accuracy."
        )
    return text


def _listed(words: Sequence[str]) -> str:
    """`2`, `2 and 4`, `2, 4 and 6`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
