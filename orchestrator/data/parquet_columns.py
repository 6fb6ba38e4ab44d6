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


@dataclass(frozen=True)
class Columns:
    """image: column name; leaf: the part of it to read ("image.bytes" for a struct); label and its class names, if any."""

    image: str
    leaf: str
    label: str | None
    class_names: tuple[str, ...] | None


def find_columns(schema: pa.Schema, file: str, image: str | None, label: str | None) -> Columns:
    """Columns of `schema`. file: for messages; image, label: of the settings. Raises DataError."""
    features = _huggingface_features(schema)
    image = _image_column(schema, features, file, image)
    label = _label_column(schema, features, file, label)
    names = features.get(label, {}).get("names") if label is not None else None
    leaf = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
    return Columns(image, leaf, label, None if names is None else tuple(str(n) for n in names))


def _image_column(schema: pa.Schema, features: Mapping[str, Any], file: str, requested: str | None) -> str:
    columns = "it has " + ", ".join(f"{field.name}: {field.type}" for field in schema)
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
) -> str | None:
    columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
    if requested is not None:
        if requested not in schema.names:
            raise DataError(
                f"{file} has no column {requested!r}, which data.label_column names; it has {columns}"
            )
        if not _is_label(schema.field(requested).type):
            raise DataError(
                f"column {requested!r} of {file} holds neither integers nor strings; it has {columns}"
            )
        return requested
    usable = [field.name for field in schema if _is_label(field.type)]
    declared = [name for name in usable if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in LABEL_NAMES if name in usable]
    if len(declared) == 1:
        return declared[0]
    return named[0] if named else None


def _holds_bytes(dtype: pa.DataType) -> bool:
    if pa.types.is_struct(dtype):
        return any(field.name == "bytes" and _is_binary(field.type) for field in dtype)
    return _is_binary(dtype)


def _is_binary(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype))


def _is_label(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_integer(dtype) or pa.types.is_string(dtype) or pa.types.is_large_string(dtype))


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
