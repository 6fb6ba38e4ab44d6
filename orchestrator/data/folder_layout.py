"""What the names of a folder of images say: the split and the class of each image.

Pure: a list of names in, arrays out. A note says what looks like labels and is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bim.orchestrator.data.file_listing import hive_values, split_of_folder
from bim.orchestrator.data.parquet_columns import LABEL_NAMES


@dataclass(frozen=True)
class FolderLayout:
    """Splits and labels of a list of names.

    Args:
        fixed_splits: image numbers by split, None if the names tell no splits.
        labels: (n,) int64, class number or -1; None if no image has a label.
        class_names: by class number.
        notes: what is not used, and why, a sentence each.
        is_plain: whether every image is labeled by CLASS/FILE, or none is, and no image is outside of the splits.
    """

    fixed_splits: dict[str, np.ndarray] | None
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]
    is_plain: bool


@dataclass
class _Part:
    """The images of one split: numbers, and names without the split folder."""

    numbers: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    classes: list[str | None] = field(default_factory=list)


def read_layout(names: Sequence[str]) -> FolderLayout:
    """Splits and labels that `names` (relative, with forward slashes) tell.

    Splits: the top folders train, val(id)(ation) and test, if a train one is among them and no other folder lies beside
    them, or if at least two of them are there. Labels, in each split by itself: the first folder is the class, as for
    torchvision's ImageFolder, unless most images lie deeper in folders of several names; a folder `label=NAME` is the
    class at any depth.
    """
    notes: list[str] = []
    parts, has_splits, strays, num_left_out = _split_parts(names, notes)
    for split, part in parts.items():
        part.classes = _classes(part.names, split if has_splits else "", notes)
    train_classes = {name for name in parts.get("train", _Part()).classes if name is not None}
    for split, part in parts.items():
        classes = {name for name in part.classes if name is not None}
        if has_splits and split != "train" and train_classes and classes and not classes & train_classes:
            notes.append(
                f"no folder of {split} (such as '{min(classes)}') is a class of train, so its images have no labels"
            )
            part.classes = [None] * len(part.numbers)
    class_names = sorted({name for part in parts.values() for name in part.classes if name is not None})
    labels: np.ndarray | None = None
    if len(class_names) >= 2:
        number_of = {name: k for k, name in enumerate(class_names)}
        labels = np.full(len(names), -1, dtype=np.int64)
        for split, part in parts.items():
            labels[part.numbers] = [-1 if name is None else number_of[name] for name in part.classes]
            without = [
                name
                for name, label in zip(part.names, part.classes, strict=True)
                if label is None and name not in strays
            ]
            if 0 < len(without) < len(part.names) - len(strays) * (split == "train"):
                of_split = f" of {split}" if has_splits else ""
                notes.append(
                    f"{len(without)} of {len(part.names)} images{of_split} lie in no class folder (such as {without[0]}); "
                    "they are used without labels"
                )
    splits = {split: np.array(sorted(part.numbers), dtype=np.int64) for split, part in parts.items()}
    all_in_one_folder = {name.count("/") for part in parts.values() for name in part.names} == {1}
    folders = {name.partition("/")[0] for part in parts.values() for name in part.names}
    had_labels = all_in_one_folder and len(folders) >= 2
    has_labels = labels is not None and bool((labels >= 0).all())
    return FolderLayout(
        fixed_splits=splits if has_splits else None,
        labels=labels,
        class_names=None if labels is None else tuple(class_names),
        notes=tuple(notes),
        is_plain=not strays
        and num_left_out == 0
        and had_labels == has_labels == (labels is not None)
        and (labels is None or folders == set(class_names)),
    )


def _split_parts(
    names: Sequence[str], notes: list[str]
) -> tuple[dict[str, _Part], bool, frozenset[str], int]:
    """The images by split (all under "train" if there are no splits), whether there are splits, the images beside the split
    folders, and how many images of other folders are left out."""
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    split_of_top = {top: split_of_folder(top) if top else None for top in set(tops)}
    splits = {split for split in split_of_top.values() if split is not None}
    others = sorted(top for top, split in split_of_top.items() if split is None and top)
    if "train" not in splits or (others and len(splits) < 2):
        return {"train": _Part(list(range(len(names))), list(names))}, False, frozenset(), 0
    parts: dict[str, _Part] = {}
    strays, left_out = [], 0
    for number, (name, top) in enumerate(zip(names, tops, strict=True)):
        split = split_of_top[top]
        if split is None and top:
            left_out += 1
            continue
        if split is None:
            strays.append(name)
        part = parts.setdefault(split or "train", _Part())
        part.numbers.append(number)
        part.names.append(name.partition("/")[2] if split else name)
    if strays:
        notes.append(
            f"{len(strays)} image{'s' * (len(strays) > 1)} beside the split folders (such as {strays[0]}) "
            f"{'are' if len(strays) > 1 else 'is'} trained on without a label"
        )
    if left_out:
        listed = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        notes.append(f"{left_out} images of folders beside train, val and test are not used ({listed})")
    return parts, True, frozenset(strays), left_out


def _classes(names: Sequence[str], split: str, notes: list[str]) -> list[str | None]:
    """The class of each name of a part, None where it has none."""
    hive = [_hive_class(name) for name in names]
    if any(name is not None for name in hive):
        return hive
    folders = [name.split("/")[:-1] for name in names]
    nested = [folder for folder in folders if folder]
    inner = {"/".join(folder[1:]) for folder in nested}
    num_direct = sum(len(folder) == 1 for folder in nested)
    if len(inner) > 1 and 2 * num_direct < len(nested):
        deep = next(folder for folder in nested if len(folder) > 1)
        of_split = f"of {split} " if split else ""
        notes.append(
            f"folders {of_split}are nested in several levels (such as {'/'.join(deep)}), so none is taken for a class; "
            "arrange images as CLASS/FILE to have labels"
        )
        return [None] * len(names)
    return [folder[0] if folder else None for folder in folders]


def _hive_class(name: str) -> str | None:
    values = hive_values(name)
    return next((values[key] for key in LABEL_NAMES if values.get(key) is not None), None)
