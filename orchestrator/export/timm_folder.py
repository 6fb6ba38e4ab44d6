"""A depth variant as a folder that timm opens by itself, and block decoders as files of their own.

`timm.create_model("local-dir:DIR", pretrained=True)` needs `model.safetensors` and `config.json`; the README beside them is
the model's card. Nothing is pickled. Serves users who take weights elsewhere, the tracker and `init_from`; it neither
trains nor measures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bim.models.backbones.backbone import Backbone
from bim.models.seeding import forked_rng, generator
from bim.orchestrator.evaluation.records import DepthReport
from bim.orchestrator.export.model_card import CardFacts, render_card

EXPORTED_BY = "bim-orchestrator"
"""Marks our folders in config.json (timm reads past it): only such a folder is ever replaced."""

REOPENED_TOLERANCE = 1e-4


def folder_name(depth: int) -> str:
    """The name of a variant's folder among its siblings."""
    return f"depth{depth:02d}"


def export_variant(
    backbone: Backbone,
    depth: int,
    model: nn.Module,
    out_dir: Path,
    card: CardFacts,
    reports: Sequence[DepthReport] = (),
    random_reports: Sequence[DepthReport] = (),
    raw: Mapping[str, float] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Path:
    """Write `model`, the variant of `depth` layers, as the timm folder `out_dir`; returns that path.

    The folder appears whole, by renaming, after it was opened again and gave the model's own features. One that this
    function wrote before is replaced. reports, random_reports, raw: of the whole family, for the card's table.
    image_size: (height, width) that `model` was built for; None: the backbone's.

    Raises ValueError if `out_dir` exists and is anything else.
    """
    out_dir = Path(out_dir)
    check_replaceable(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    size = image_size or backbone.image_size
    with TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        _save_tensors(model.state_dict(), fresh / "model.safetensors", {})
        config = timm_config(backbone, depth, model, size)
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        text = render_card(backbone, depth, card, size, reports, random_reports, raw)
        (fresh / "README.md").write_text(text, encoding="utf-8")
        _check_reopened(backbone, depth, fresh, model, size)
        if out_dir.exists():
            out_dir.rename(Path(scratch) / "old")
        fresh.rename(out_dir)
    return out_dir


def rewrite_card(
    backbone: Backbone,
    depth: int,
    out_dir: Path,
    card: CardFacts,
    reports: Sequence[DepthReport],
    random_reports: Sequence[DepthReport],
    raw: Mapping[str, float],
) -> None:
    """The card of a folder that `export_variant` wrote, with other measurements; its weights stay as they are."""
    text = render_card(backbone, depth, card, backbone.image_size, reports, random_reports, raw)
    fresh = Path(out_dir) / ".README.md"
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(Path(out_dir) / "README.md")


def export_decoder(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write one block's decoder, its tensors by name, as a safetensors file; replaces an existing one by renaming.

    metadata: strings to keep in the file's header.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    _save_tensors(state, fresh, {"exported_by": EXPORTED_BY, **(metadata or {})})
    fresh.replace(path)
    return path


def timm_config(backbone: Backbone, depth: int, model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """What goes to config.json: how to build the model and how to prepare images for it, as they were evaluated.

    Written out instead of taken from timm's own pretrained configuration, which tells the licence, the origin and the papers
    of weights that are not these.
    """
    known: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return {
        "architecture": known["architecture"],
        "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": "avg",
        "model_args": backbone.variant_args(depth, size),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, *size],
            "fixed_input_size": known.get("fixed_input_size", False),
            "crop_pct": 1.0,  # the short side as a whole
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
            "pool_size": None,
        },
        "exported_by": EXPORTED_BY,
    }


def check_replaceable(out_dir: Path) -> None:
    """Raises ValueError if `out_dir` exists and is neither empty nor a folder that `export_variant` wrote."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    try:
        ours = json.loads((out_dir / "config.json").read_text(encoding="utf-8"))["exported_by"] == EXPORTED_BY
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ValueError(
            f"{out_dir} exists and is not an exported model of this project; move it away or choose another folder"
        )


def _save_tensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    path.touch()
    mode = path.stat().st_mode  # safetensors writes files that only their owner may read, whatever the umask
    save_file(tensors, path, {"format": "pt", **metadata})
    path.chmod(mode)


@torch.inference_mode()
def _check_reopened(
    backbone: Backbone, depth: int, folder: Path, model: nn.Module, size: tuple[int, int]
) -> None:
    """What timm makes of the folder gives the features of `model`; else the run would deliver something untested."""
    device = next(model.parameters()).device
    with forked_rng("reopen"):
        reopened = backbone.load_exported(folder, depth).to(device)
    image = torch.randn(1, 3, *size, generator=generator("reopen")).to(device)
    was_training = model.training
    difference = (model.eval()(image) - reopened(image)).abs().max().item()
    model.train(was_training)
    if not difference <= REOPENED_TOLERANCE:
        raise RuntimeError(
            f"timm {timm.__version__} opens the exported model with other features (difference {difference:.2g}); "
            "nothing was exported"
        )
