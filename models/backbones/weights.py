"""Reading the weights that a run starts from (`init_from`): timm's pretrained ones, a timm folder, or a file.

Nothing is unpickled: safetensors, or torch files with `weights_only=True`. Which keys are wanted is the
family's affair.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bim.models.seeding import forked_rng

FOLDER_PREFIX = "local-dir:"
# In the order in which a timm folder is searched.
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Weights:
    """Named tensors of one checkpoint, those of a safetensors file read only when taken.

    source: how to call it in a message. image_size: (height, width) it was trained at, where it says so.
    shapes: of every tensor, by name.
    """

    def __init__(
        self,
        source: str,
        tensors: dict[str, Tensor] | None = None,
        file: Path | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        self.source = source
        self.image_size = image_size
        self._file = file
        self._tensors = tensors or {}
        self.shapes: dict[str, tuple[int, ...]] = {
            key: tuple(value.shape) for key, value in self._tensors.items()
        }
        if file is not None:
            with safe_open(file, "pt") as opened:
                self.shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118

    def take(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors as float32 on the CPU. Raises ValueError if one is not there."""
        wanted = list(keys)
        missing = [key for key in wanted if key not in self.shapes]
        if missing:
            raise ValueError(
                f"init_from: {self.source} has no '{missing[0]}' ({len(missing)} of {len(wanted)} tensors missing)"
            )
        if self._file is None:
            return {key: self._tensors[key].float() for key in wanted}
        with safe_open(self._file, "pt") as opened:
            return {key: opened.get_tensor(key).float() for key in wanted}


def open_weights(init_from: str) -> Weights:
    """`init_from` as weights: a timm name, local-dir:DIR, DIR, or a .safetensors / torch file.

    Raises ValueError if it is none of these, or cannot be read.
    """
    if timm.is_model(init_from) and ":" not in init_from:
        return pretrained_weights(init_from)
    path = Path(init_from.removeprefix(FOLDER_PREFIX)).expanduser()
    if path.is_dir():
        return folder_weights(path)
    if init_from.startswith(FOLDER_PREFIX):
        raise ValueError(f"init_from: there is no folder '{path}'")
    if path.is_file():
        return file_weights(path)
    nearest = difflib.get_close_matches(init_from, timm.list_models(), n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise ValueError(
        f"init_from '{init_from}' is neither a timm name nor a folder nor a file of weights{hint}"
    )


def pretrained_weights(name: str) -> Weights:
    """timm's own pretrained weights, from its cache or the net."""
    try:
        with forked_rng("pretrained"):
            model = timm.create_model(name, pretrained=True)
    # Hub, network, disk and format errors share no base class; all of them mean the same to the user.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"init_from: the pretrained weights of '{name}' cannot be had ({reason}); without a network, give a timm "
            "folder or a .safetensors file"
        ) from error
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    return Weights(f"timm's '{name}'", tensors=model.state_dict(), image_size=tuple(size) if size else None)


def folder_weights(folder: Path) -> Weights:
    """A timm folder: weights beside a config.json that tells the image size."""
    file = next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"init_from: the folder '{folder}' holds neither {' nor '.join(FOLDER_WEIGHTS)}")
    return file_weights(file, config_image_size(folder / "config.json"))


def config_image_size(config: Path) -> tuple[int, int] | None:
    """(height, width) that a timm config.json states, None if there is none. Raises ValueError if it is no JSON."""
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text())
        size = content.get("model_args", {}).get("img_size") or content.get("pretrained_cfg", {}).get(
            "input_size"
        )
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"init_from: '{config}' is not a timm config ({error})") from error
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def file_weights(file: Path, image_size: tuple[int, int] | None = None) -> Weights:
    """One file of weights: .safetensors, or what torch reads with weights_only=True (also nested under "model")."""
    try:
        if file.suffix == ".safetensors":
            return Weights(f"'{file}'", file=file, image_size=image_size)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, UnpicklingError):  # torch's own words advise to trust the file
            reason = "it is no torch file of plain tensors, and nothing else is unpickled"
        raise ValueError(
            f"init_from: '{file}' cannot be read as weights ({reason}); give a .safetensors file"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"init_from: '{file}' holds a {type(content).__name__}, not named tensors")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return Weights(f"'{file}'", tensors=tensors, image_size=image_size)
