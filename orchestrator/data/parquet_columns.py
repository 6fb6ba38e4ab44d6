"""The image column and the label column of a Parquet schema: by the settings, by the Hugging Face metadata, else by
type and name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bim.orchestrator.data.errors import DataError

IMAGE_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "bytes")
LABEL_NAMES = ("label", "labels")
LABEL_LIKE = ("category", "class", "class_id", "class_name", "classes", "cls", "target", "y")
"""Columns of other data sets that may hold classes; they are used if the settings name them."""


@dataclass(frozen=True)
class Columns:
    """The columns of one shard.

    Args:
        image: column name.
        leaf: the part of it to read, "image.bytes" for a struct.
        label: column name, None if the shard has none.
        class_names: of the label column, where Hugging Face's metadata tells them.
        notes: what looks like labels and is not used, and why.
    """

    image: str
    leaf: str
    label: str | None
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def find_columns(
    schema: pa.Schema, file: str, image: str | None, label: str | None, in_folders: bool = False
) -> Columns:
    """Columns of `schema`.

    Args:
        file: for messages.
        image, label: of the settings.
        in_folders: whether the names of folders (`label=cat/0.parquet`) hold the labels.

    Raises:
        DataError: no image column, several, or a column of the settings that is not there or of no use.
    """
    features = _huggingface_features(schema)
    image = _image_column(schema, features, file, image)
    leaf = image_leaf(schema, image)
    if in_folders:
        return Columns(image, leaf, None, None)
    label, notes = _label_column(schema, features, file, label)
    return Columns(image, leaf, label, class_names_of(schema, label), notes)


def image_leaf(schema: pa.Schema, column: str) -> str:
    """The part of an image column that is read: "image.bytes" of a struct, "image" of plain bytes."""
    return f"{column}.bytes" if pa.types.is_struct(schema.field(column).type) else column


def class_names_of(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """The class names of a label column in Hugging Face's metadata."""
    if label is None:
        return None
    names = _huggingface_features(schema).get(label, {}).get("names")
    return tuple(str(name) for name in names) if isinstance(names, list) else None


def columns_text(schema: pa.Schema) -> str:
    """`image: binary, label: int64`; of many columns the first twenty."""
    listed = [f"{field.name}: {field.type}" for field in schema]
    return ", ".join(listed[:20]) + ", ..." * (len(listed) > 20)


def _image_column(schema: pa.Schema, features: Mapping[str, Any], file: str, requested: str | None) -> str:
    columns = f"it has {columns_text(schema)}"
    usable = [field.name for field in schema if _holds_bytes(field.type)]
    if requested is not None:
        if requested not in schema.names:
            raise DataError(f"{file} has no column {requested!r}, which data.image_column names; {columns}")
        if requested not in usable:
            raise DataError(
                f"column {requested!r} of {file} holds no image bytes (binary, or struct<bytes, path>); {columns}"
            )
        return requested
    if not usable:
        raise DataError(
            f"{file} has no image column (binary, or struct<bytes, path> as Hugging Face writes it); {columns}; "
            "set data.source to Parquet files that hold the images themselves"
        )
    declared = [name for name in usable if features.get(name, {}).get("_type") == "Image"]
    named = [name for name in IMAGE_NAMES if name in usable]
    for candidates in (declared, usable):
        if len(candidates) == 1:
            return candidates[0]
    if named:
        return named[0]
    raise DataError(f"{file} has several columns that may hold images; set data.image_column: {columns}")


def _label_column(
    schema: pa.Schema, features: Mapping[str, Any], file: str, requested: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """The label column, if there is one, and notes on columns that look like one and are not taken."""
    if requested is not None:
        if requested not in schema.names:
            raise DataError(
                f"{file} has no column {requested!r}, which data.label_column names; it has {columns_text(schema)}"
            )
        if not is_label(schema.field(requested).type):
            raise DataError(
                f"column {requested!r} of {file} holds {schema.field(requested).type}, which is neither integers nor "
                f"strings, one class per image; it has {columns_text(schema)}"
            )
        return requested, ()
    usable = [field.name for field in schema if is_label(field.type)]
    declared = [name for name in usable if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in LABEL_NAMES if name in usable]
    if len(declared) == 1:
        return declared[0], ()
    if named:
        return named[0], ()
    if declared:  # such as fine_label and coarse_label
        chosen = max(declared, key=lambda name: len(class_names_of(schema, name) or ()))
        listed = " and ".join(declared)
        return chosen, (
            f"{listed} hold classes; '{chosen}' is taken as the label, --data.label_column names another",
        )
    notes = [
        f"column '{name}' holds {schema.field(name).type}, not one class per image, so the images have no labels"
        for name in LABEL_NAMES
        if name in schema.names
    ]
    label_like = [
        name for name in usable if name.lower() in LABEL_LIKE or name.lower().endswith(("_label", "_class"))
    ]
    if not notes and label_like:
        notes.append(
            f"column '{label_like[0]}' looks like labels and is not used; --data.label_column {label_like[0]} takes it"
        )
    return None, tuple(notes)


def _holds_bytes(dtype: pa.DataType) -> bool:
    if pa.types.is_struct(dtype):
        return any(field.name == "bytes" and _is_binary(field.type) for field in dtype)
    return _is_binary(dtype)


def _is_binary(dtype: pa.DataType) -> bool:
    if pa.types.is_dictionary(dtype):
        return _is_binary(dtype.value_type)
    return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or _is(dtype, "binary_view"))


def is_text(dtype: pa.DataType) -> bool:
    """Whether a column holds strings, however they are encoded."""
    if pa.types.is_dictionary(dtype):
        return is_text(dtype.value_type)
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or _is(dtype, "string_view"))


def is_label(dtype: pa.DataType) -> bool:
    """Whether a column can hold class numbers or names: integers, strings, booleans, or floats that are whole."""
    if pa.types.is_dictionary(dtype):
        return is_label(dtype.value_type)
    kinds = pa.types.is_integer(dtype), pa.types.is_floating(dtype), pa.types.is_boolean(dtype)
    return is_text(dtype) or any(kinds)


def _is(dtype: pa.DataType, kind: str) -> bool:
    """`pa.types.is_KIND(dtype)`; older versions of pyarrow do not have every kind."""
    return bool(getattr(pa.types, f"is_{kind}", lambda _: False)(dtype))


def _huggingface_features(schema: pa.Schema) -> dict[str, Any]:
    """{"image": {"_type": "Image"}, ...}, empty if the file was not written by Hugging Face's datasets."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return (
        {name: f for name, f in features.items() if isinstance(f, dict)} if isinstance(features, dict) else {}
    )
