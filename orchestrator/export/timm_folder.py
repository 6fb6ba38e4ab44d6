"""A depth variant as a folder that timm opens without this package, and block decoders as files.

`timm.create_model("local-dir:DIR", pretrained=True)` needs `model.safetensors` and `config.json`; the README beside them is
the model's card. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from bim.models.backbones.backbone import Backbone
from bim.models.seeding import forked_rng, generator
from bim.orchestrator.evaluation.records import EvaluationResult
from bim.orchestrator.export.model_card import NOT_EVALUATED, CardFacts, render_card
from bim.orchestrator.files import atomic_write, make_folder

EXPORTED_BY = "bim-orchestrator"
"""Marks exported folders in config.json, where timm ignores it: only such a folder is ever replaced."""

REOPENED_TOLERANCE = 1e-4
"""Largest difference between the features of a variant and of the model that timm opens."""


def folder_name(depth: int) -> str:
    """The name of a variant's folder among its siblings."""
    return f"depth{depth:02d}"


def export_variant(
    backbone: Backbone,
    depth: int,
    model: nn.Module,
    out_dir: Path,
    card: CardFacts,
    evaluation: EvaluationResult = NOT_EVALUATED,
    image_size: tuple[int, int] | None = None,
) -> Path:
    """Write `model`, the variant of `depth` layers, as the timm folder `out_dir`; returns that path.

    The folder is committed by rename after timm has opened it and given the features of `model`. A folder that this
    function wrote before is replaced.

    Args:
        evaluation: of all depths, for the card's table.
        image_size: (height, width) that `model` was built for; None: the backbone's.

    Raises:
        ValueError: `out_dir` exists and is anything else.
        RuntimeError: timm opens the folder with other features.
        StorageError: the file system refuses, or there is no folder two levels above.
    """
    out_dir = Path(out_dir)
    check_replaceable(out_dir)
    make_folder(out_dir.parent)
    size = image_size or backbone.image_size
    with TemporaryDirectory(prefix=f".{out_dir.name}-", suffix=".tmp", dir=out_dir.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        _save_tensors(model.state_dict(), fresh / "model.safetensors", {})
        config = timm_config(backbone, depth, model, size)
        atomic_write(fresh / "config.json", json.dumps(config, indent=2) + "\n")
        atomic_write(fresh / "README.md", render_card(backbone, depth, card, size, evaluation))
        _check_reopened(backbone, depth, fresh, model, size)
        if out_dir.exists():
            out_dir.rename(Path(scratch) / "old")
        fresh.rename(out_dir)
    return out_dir


def rewrite_card(
    backbone: Backbone, depth: int, out_dir: Path, card: CardFacts, evaluation: EvaluationResult
) -> None:
    """Replace the card of a folder that `export_variant` wrote; the weights stay unchanged."""
    text = render_card(backbone, depth, card, backbone.image_size, evaluation)
    atomic_write(Path(out_dir) / "README.md", text)


def export_decoder(state: Mapping[str, Tensor], path: Path) -> Path:
    """Write one block's decoder, its tensors by name, as a safetensors file; an existing one is replaced."""
    path = Path(path)
    make_folder(path.parent)
    _save_tensors(state, path, {"exported_by": EXPORTED_BY})
    return path


def timm_config(backbone: Backbone, depth: int, model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """The content of config.json: how to build the model, and how to transform images as in the evaluation.

    timm's own pretrained configuration is not copied: it holds the license, the origin and the papers of other weights.
    """
    timm_cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return {
        "architecture": timm_cfg["architecture"]
        if backbone.registered_by is None
        else backbone.name.partition(".")[0],
        "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": "avg",
        "model_args": backbone.variant_args(depth, size),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, *size],
            "fixed_input_size": timm_cfg.get("fixed_input_size", False),
            "crop_pct": 1.0,  # the whole short side
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "first_conv": timm_cfg.get("first_conv"),
            "classifier": timm_cfg.get("classifier"),
            "pool_size": None,
        },
        "exported_by": EXPORTED_BY,
    }


def check_replaceable(out_dir: Path) -> None:
    """Raises ValueError if `out_dir` exists and is neither empty nor a folder that `export_variant` wrote."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    try:
        config = json.loads((out_dir / "config.json").read_text(encoding="utf-8"))
        is_export = config["exported_by"] == EXPORTED_BY
    except (OSError, ValueError, KeyError, TypeError):
        is_export = False
    if not is_export:
        raise ValueError(
            f"{out_dir} exists and is not an exported model of this project; move it away or choose another folder"
        )


def _save_tensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    atomic_write(path, _in_one_order(save(tensors, {"format": "pt", **metadata})))


def _in_one_order(content: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: safetensors writes several of them in random order."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@torch.inference_mode()
def _check_reopened(
    backbone: Backbone, depth: int, folder: Path, model: nn.Module, size: tuple[int, int]
) -> None:
    """Raise RuntimeError unless the model that timm opens from the folder gives the features of `model`."""
    device = next(model.parameters()).device
    with forked_rng("reopen"):
        reopened = backbone.load_exported(folder, depth).to(device)
    image = torch.randn(1, 3, *size, generator=generator("reopen")).to(device)
    was_training = model.training
    difference = (model.eval()(image) - reopened(image)).abs().max().item()
    model.train(was_training)
    if not difference <= REOPENED_TOLERANCE:
        raise RuntimeError(
            f"outputs of the exported model differ by {difference:.2g} (tolerance {REOPENED_TOLERANCE:g}) when timm "
            f"{timm.__version__} opens it; nothing was exported"
        )
