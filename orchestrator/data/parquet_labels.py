"""Class numbers of the rows of Parquet shards, from a column of any encoding or from the names of folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bim.orchestrator.data.errors import DataError, system_reason
from bim.orchestrator.data.parquet_columns import Columns, is_text


@dataclass(frozen=True)
class ShardLabels:
    """Where the labels of one shard are.

    Args:
        file: path. name: in messages.
        rows: number of rows.
        columns: of which `label` is None in a shard without labels.
        from_folder: label of all rows, as a folder `label=NAME` tells it.
    """

    file: str
    name: str
    rows: int
    columns: Columns
    from_folder: str | None = None


@dataclass(frozen=True)
class Labels:
    """(n,) int64 class numbers, -1 for none; None if no row has one. `is_plain`: by integers or strings in every row."""

    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]
    is_plain: bool = True


def read_labels(source: str, shards: Sequence[ShardLabels], requested: str | None) -> Labels:
    """The labels of all rows, in the order of the shards.

    Rows whose label is null or negative have none, which a note says, unless the settings name the column.

    Raises:
        DataError: labels of two shards that cannot be compared; a label beyond the class names; a column named by the
            settings that leaves rows without a label or holds fractions.
    """
    if all(shard.columns.label is None and shard.from_folder is None for shard in shards):
        return Labels(None, None, ())
    names = _class_names(shards)
    values: list[pa.ChunkedArray] = []
    for shard in shards:
        try:
            values.append(_shard_values(shard))
        except _NoClasses as error:
            reason = f"column '{shard.columns.label}' of {shard.name} holds {error}"
            if requested is not None:
                raise DataError(f"{reason}; set data.label_column to a column of classes") from error
            return Labels(None, None, (f"{reason}, so the images have no labels",))
    with_labels = [
        shard for shard, column in zip(shards, values, strict=True) if column.null_count < len(column)
    ]
    kinds = {pa.types.is_large_string(column.type): shard for shard, column in zip(shards, values, strict=True)
             if shard in with_labels}  # fmt: skip
    if len(kinds) == 2:
        raise DataError(
            f"{kinds[True].name} has strings for labels and {kinds[False].name} numbers, which cannot be compared; "
            "set data.source to shards of one data set, or data.label_column to another column"
        )
    is_names = bool(kinds) and next(iter(kinds))
    if is_names:
        joined = pa.chunked_array(
            [c for v in values for c in v.cast(pa.large_string()).chunks], pa.large_string()
        )
        names = tuple(sorted(pc.unique(joined.drop_null()).to_pylist()))
        joined = pc.index_in(joined, value_set=pa.array(names, type=pa.large_string()))
    else:
        joined = pa.chunked_array([c for v in values for c in v.cast(pa.int64()).chunks], pa.int64())
    labels = joined.cast(pa.int64()).fill_null(-1).to_numpy().astype(np.int64)
    return _checked(source, shards, labels, names, requested, is_names)


def _checked(
    source: str,
    shards: Sequence[ShardLabels],
    labels: np.ndarray,
    names: tuple[str, ...] | None,
    requested: str | None,
    is_names: bool,
) -> Labels:
    label = next((shard.columns.label for shard in shards if shard.columns.label is not None), "label")
    notes: list[str] = []
    labels = np.maximum(labels, -1)
    if unlabeled := int((labels < 0).sum()):
        problem = f"column {label!r} of {source} leaves {unlabeled} of {len(labels)} rows without a label"
        if requested is not None:
            raise DataError(f"{problem} (null or negative); label them or leave data.label_column unset")
        if unlabeled == len(labels):
            return Labels(None, None, (f"{problem}, so the images have no labels",))
        notes.append(f"{problem}; these images are trained on and not scored")
    if names is not None and labels.max() >= len(names):
        raise DataError(
            f"column {label!r} of {source} holds label {labels.max()}, but its metadata names only "
            f"{len(names)} classes; correct the file, or set data.label_column to another column"
        )
    is_plain = not unlabeled and all(_is_plain(shard) for shard in shards)
    if names is None and labels.max() >= len(labels):  # identifiers rather than class numbers
        has_label = labels >= 0
        labels = labels.copy()
        labels[has_label] = np.unique(labels[has_label], return_inverse=True)[1]
        is_plain = False
    return Labels(labels, names, tuple(notes), is_plain)


def _is_plain(shard: ShardLabels) -> bool:
    return (
        shard.from_folder is None and shard.columns.label in ("label", "labels") and not shard.columns.notes
    )


def _class_names(shards: Sequence[ShardLabels]) -> tuple[str, ...] | None:
    """The class names of the metadata, equal in all shards that have some."""
    named = [shard for shard in shards if shard.columns.class_names is not None]
    for other in named[1:]:
        if other.columns.class_names != named[0].columns.class_names:
            raise DataError(
                f"{named[0].name} and {other.name} differ in their class names; "
                "set data.source to shards of one data set"
            )
    return named[0].columns.class_names if named else None


class _NoClasses(Exception):
    """A column whose values cannot be classes; the message says what they are."""


def _shard_values(shard: ShardLabels) -> pa.ChunkedArray:
    """Labels of one shard as int64 or large strings, null for none. Raises _NoClasses, and DataError for a damaged file."""
    if shard.columns.label is None:
        text = pa.scalar(shard.from_folder, pa.large_string())
        return pa.chunked_array([pa.repeat(text, shard.rows)])
    try:
        with pq.ParquetFile(shard.file) as reader:
            column = reader.read(columns=[shard.columns.label]).column(0)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
    except (pa.ArrowException, OSError) as error:
        problem = system_reason(error) if isinstance(error, OSError) else None
        reason = problem or f"{' '.join(str(error).split())}; copy it again or remove it"
        raise DataError(f"column '{shard.columns.label}' of {shard.file} cannot be read: {reason}") from error
    if is_text(column.type):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise _NoClasses("text that is not UTF-8") from error
        return column.cast(pa.large_string())
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
        whole = pc.all(pc.equal(pc.floor(column), column)).as_py()
        if whole is False or (pc.max(pc.abs(column)).as_py() or 0) > 2**53:
            raise _NoClasses("numbers that are not whole")
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise _NoClasses("numbers of more than 63 bits") from error
