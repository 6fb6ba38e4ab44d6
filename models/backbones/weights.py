"""Initial weights of a run (`init_from`): timm's pretrained ones, a timm folder, or a file, and whether they fit.

Nothing is unpickled: files are safetensors, or torch files read with `weights_only=True`.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
from safetensors import safe_open
from torch import Tensor

from bim.models.seeding import forked_rng

FOLDER_PREFIX = "local-dir:"
AVERAGED = ("teacher", "ema", "target_encoder", "momentum")
"""Parts of the prefixes of weights that were averaged over the training, which are meant for use."""

# Files of a timm folder, in order of preference.
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# How files of torch.save begin: those of today, and those before torch 1.6.
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


class Weights:
    """Named tensors of one checkpoint; those of a safetensors file are read when taken.

    source: its name in messages. image_size: (height, width) of its training, where it is stated.
    shapes: of every tensor, by name. prefix: that `for_names` removed from the names.
    """

    prefix = ""

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

    def for_names(self, names: Iterable[str]) -> Weights:
        """These weights under timm's `names`, without the prefix that all of their keys share, if they share one.

        Other frameworks save a model inside another module (`module.backbone.`, `teacher.`). Of several prefixes that
        fit, that of a teacher or an average of weights is taken; `prefix` tells which one was. Raises ValueError if two
        others fit equally.
        """
        names = list(names)
        if not names or any(name in self.shapes for name in names):
            return self
        fitting = Counter(
            key[: -len(name)] for name in names for key in self.shapes if key.endswith(f".{name}")
        )
        matches = max(fitting.values(), default=0)
        if 2 * matches < len(names):
            return self
        prefixes = [prefix for prefix, count in fitting.items() if count == matches]
        averaged = [prefix for prefix in prefixes if any(word in prefix.lower() for word in AVERAGED)]
        if len(prefixes) > 1 and len(averaged) != 1:
            listed = " and ".join(f"'{prefix}'" for prefix in sorted(prefixes))
            raise ValueError(
                f"init_from: {self.source} holds several models, under {listed}; save the weights of one of them to a file"
            )
        prefix = (averaged if len(prefixes) > 1 else prefixes)[0]
        inner = copy.copy(self)
        inner.prefix = self.prefix + prefix
        inner.shapes = {
            key.removeprefix(prefix): shape for key, shape in self.shapes.items() if key.startswith(prefix)
        }
        return inner

    def take(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors as float32 on the CPU. Raises ValueError if one is missing."""
        keys = list(keys)
        missing = [key for key in keys if key not in self.shapes]
        if missing:
            raise ValueError(
                f"init_from: {self.source} has no '{missing[0]}' ({len(missing)} of {len(keys)} tensors missing)"
            )
        if self._file is None:
            return {key: self._tensors[self.prefix + key].float() for key in keys}
        with safe_open(self._file, "pt") as opened:
            return {key: opened.get_tensor(self.prefix + key).float() for key in keys}


def check_fit(
    weights: Weights,
    expected: Mapping[str, tuple[int, ...]],
    parts: Sequence[str],
    can_resize: Callable[[str, tuple[int, ...], tuple[int, ...]], bool] = lambda key, given, needed: False,
    is_ignored: Callable[[str], bool] = lambda key: False,
) -> None:
    """Raises ValueError if the checkpoint lacks a tensor, has one of another shape, or unknown ones inside `parts`.

    expected: shapes by timm's names. parts: module paths all of whose tensors must be expected, except those that
    `is_ignored`. can_resize: (key, given shape, needed shape) -> whether the tensor can be resized.
    """
    for key, needed in expected.items():
        given = weights.shapes.get(key)
        if given is None:
            raise ValueError(
                f"init_from: {weights.source} has no '{key}', which the backbone needs; "
                "check backbone.name and backbone.model_args"
            )
        if given != needed and not can_resize(key, given, needed):
            raise ValueError(
                f"init_from: '{key}' of {weights.source} has shape {given}, the backbone needs {needed}; "
                "check backbone.name and backbone.model_args"
            )
    # Ignoring a layer, a LayerScale or a norm would make another model of the same weights.
    prefixes = tuple(f"{path}." for path in parts)
    for key in weights.shapes:
        if key.startswith(prefixes) and key not in expected and not is_ignored(key):
            raise ValueError(
                f"init_from: {weights.source} has '{key}', which the backbone does not; its layers are of another type"
            )


def open_weights(init_from: str) -> Weights:
    """`init_from` as weights: a timm name, local-dir:DIR, DIR, or a .safetensors / torch file.

    Raises ValueError if it is none of these, or cannot be read.
    """
    if timm.is_model(init_from) and ":" not in init_from:
        return pretrained_weights(init_from)
    path = Path(os.path.expanduser(init_from.removeprefix(FOLDER_PREFIX)))
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
    """timm's pretrained weights, from its cache or the network. Raises ValueError if they cannot be loaded."""
    try:
        with forked_rng("pretrained"):
            model = timm.create_model(name, pretrained=True)
    except (AssertionError, AttributeError, NameError, TypeError):
        raise  # bugs, not failed downloads
    # Errors of the hub, the network, the disk and the format share no other base class.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"init_from: the pretrained weights of '{name}' cannot be loaded ({reason}); without a network, give a timm "
            "folder or a .safetensors file"
        ) from error
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    return Weights(f"timm's '{name}'", tensors=model.state_dict(), image_size=tuple(size) if size else None)


def folder_weights(folder: Path) -> Weights:
    """A timm folder: weights and a config.json with the image size. Raises ValueError if it holds none that can be read."""
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
        if size is None:
            return None
        return (int(size), int(size)) if isinstance(size, int) else (int(size[-2]), int(size[-1]))
    # A file of any content: not JSON, not UTF-8, nested without end, a size that is none.
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError, OSError) as error:
        raise ValueError(f"init_from: '{config}' is not a timm config ({error})") from error


def file_weights(file: Path, image_size: tuple[int, int] | None = None) -> Weights:
    """One file of weights: .safetensors, or what torch reads with weights_only=True (also nested under "model").

    Raises ValueError if it is no such file.
    """
    try:
        if file.suffix == ".safetensors":
            return Weights(f"'{file}'", file=file, image_size=image_size)
        with open(file, "rb") as opened:
            start = opened.read(len(_ZIP))
        if start != _ZIP and not start.startswith(_PICKLE):
            raise UnpicklingError("it is neither a zip archive nor a pickle")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, UnpicklingError):  # torch's message recommends to trust the file
            reason = "it is no torch file of plain tensors, and nothing else is unpickled"
        if isinstance(error, OSError) and error.strerror:
            raise ValueError(f"init_from: '{file}' cannot be read: {error.strerror}") from error
        raise ValueError(
            f"init_from: '{file}' cannot be read as weights ({reason}); give a .safetensors file"
        ) from error
    for key in ("model", "state_dict", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"init_from: '{file}' holds a {type(content).__name__}, not named tensors")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"init_from: '{file}' holds no named tensors; give a file of one model's weights")
    return Weights(f"'{file}'", tensors=tensors, image_size=image_size)
