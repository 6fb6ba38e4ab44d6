"""Which column of a Parquet schema holds the images and which the labels: by the user's word, by the Hugging Face
metadata, else by type and name. For `ParquetSource`; reads schemas, no rows."""

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
    """image: column name; leaf: what to read of it ("image.bytes" for a struct); label and its class names, if any."""

    image: str
    leaf: str
    label: str | None
    class_names: tuple[str, ...] | None


def find_columns(schema: pa.Schema, where: str, image: str | None, label: str | None) -> Columns:
    """Columns of `schema`. where: the file, for messages; image, label: the user's choice. Raises DataError."""
    features = _huggingface_features(schema)
    image = _image_column(schema, features, where, image)
    label = _label_column(schema, features, where, label)
    names = features.get(label, {}).get("names") if label is not None else None
    leaf = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
    return Columns(image, leaf, label, None if names is None else tuple(str(n) for n in names))


def _image_column(schema: pa.Schema, features: Mapping[str, Any], where: str, wanted: str | None) -> str:
    listed = "it has " + ", ".join(f"{field.name}: {field.type}" for field in schema)
    usable = [field.name for field in schema if _holds_bytes(field.type)]
    if wanted is not None:
        if wanted not in schema.names:
            raise DataError(f"{where} has no column {wanted!r}, the data.image_column asked for; {listed}")
        if wanted not in usable:
            raise DataError(
                f"column {wanted!r} of {where} holds no image bytes (binary, or struct<bytes, path>); {listed}"
            )
        return wanted
    if not usable:
        raise DataError(
            f"{where} has no image column (binary, or struct<bytes, path> as Hugging Face writes it); {listed}; "
            "set data.source to Parquet files that hold the images themselves"
        )
    declared = [name for name in usable if features.get(name, {}).get("_type") == "Image"]
    named = [name for name in IMAGE_NAMES if name in usable]
    for candidates in (declared, usable):
        if len(candidates) == 1:
            return candidates[0]
    if named:
        return named[0]
    raise DataError(f"{where} has several columns that may hold images; set data.image_column: {listed}")


def _label_column(
    schema: pa.Schema, features: Mapping[str, Any], where: str, wanted: str | None
) -> str | None:
    listed = ", ".join(f"{field.name}: {field.type}" for field in schema)
    if wanted is not None:
        if wanted not in schema.names:
            raise DataError(
                f"{where} has no column {wanted!r}, the data.label_column asked for; it has {listed}"
            )
        if not _is_label(schema.field(wanted).type):
            raise DataError(
                f"column {wanted!r} of {where} holds neither integers nor strings; it has {listed}"
            )
        return wanted
    usable = [field.name for field in schema if _is_label(field.type)]
    declared = [name for name in usable if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in LABEL_NAMES if name in usable]
    if len(declared) == 1:
        return declared[0]
    return named[0] if named else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


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
