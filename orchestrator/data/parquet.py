"""Images in Parquet shards (Hugging Face's, or any with a binary column), read with pyarrow by row groups.

A process keeps `chunks.window` row groups (as many as fit CACHE_BYTES), and the permutation of an epoch stays inside
such a window, so a process reads each row group at most once per epoch. Every worker reads every window, so W workers
read the bytes of an epoch W times (mostly from the page cache). Measured on 1,649 photographs in 9 row groups: 9 reads
per epoch for any window. A full permutation needs 0.53 reads per image with 4 row groups in memory and 0.89 with one,
and then spends more time on reading than on decoding."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from bim.orchestrator.data.decode import decode_rgb
from bim.orchestrator.data.errors import DataError, ImageDecodeError, is_exhausted, system_reason
from bim.orchestrator.data.file_listing import hive_values, split_of_shard
from bim.orchestrator.data.fingerprint import computed_once
from bim.orchestrator.data.parquet_columns import LABEL_NAMES, Columns, find_columns
from bim.orchestrator.data.parquet_labels import ShardLabels, read_labels
from bim.orchestrator.data.sampler import Chunks

CACHE_BYTES = 256 * 2**20  # per process; at 110 KB per image a window of about 2,400 images
MAX_GROUP_BYTES = 2**30  # every worker reads a row group as a whole
_OPEN_FILES = 16


class ParquetSource:
    """Rows of one or more shards, in the order of the file names, as images.

    The image column is Hugging Face's struct<bytes, path> or plain binary, in any encoding. Labels: a column of numbers
    (class names from the Hugging Face metadata, if any) or strings (classes numbered by their sorted names), or folders
    `label=NAME`; rows whose label is null or negative have none, see `parquet_labels`.
    Splits: `fixed_splits` if the name or folder of every shard names its split and one is train.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        image_column: str | None = None,
        label_column: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """root: of the settings, for messages. Reads footers and the label column. Raises DataError."""
        self.name = str(root)
        self._files = tuple(str(file.resolve()) for file in files)
        base = root.resolve() if root.is_dir() else root.resolve().parent
        self._names = tuple(str(file.resolve().relative_to(base)) for file in files)
        shards = _read_shards(self._files, self._names, image_column, label_column)
        self._schema_text = shards[0].schema_text
        self._leaves = tuple(shard.columns.leaf for shard in shards)

        self._groups = tuple((n, group) for n, shard in enumerate(shards) for group in range(len(shard.rows)))
        """(file, row group within it) of each row group."""
        sizes = [rows for shard in shards for rows in shard.rows]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        if not len(self):
            raise DataError(f"{root} has no rows; set data.source to Parquet files that hold images")
        largest_group = max(1, *(size for shard in shards for size in (0, *shard.group_bytes)))
        self.chunks = Chunks(self._starts, window=max(1, cache_bytes // largest_group))
        self.fixed_splits = self._splits(files, [sum(shard.rows) for shard in shards])
        labels = read_labels(self.name, [shard.labels for shard in shards], label_column)
        self.labels, self.class_names = labels.labels, labels.class_names
        self.notes = tuple(
            dict.fromkeys([*(n for shard in shards for n in shard.columns.notes), *labels.notes])
        )
        in_hive = any(part.lower().startswith("split=") for name in self._names for part in Path(name).parts)
        self._is_plain = labels.is_plain and not in_hive
        self._reset_caches()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def load(self, index: int) -> Tensor:
        """-> (3, H, W) uint8. Raises ImageDecodeError, also for a row without bytes or in a damaged row group."""
        group = self._group_of(index)
        try:
            values = self._values(group)
        except (pa.ArrowException, OSError) as error:
            problem = system_reason(error) if isinstance(error, OSError) else None
            if isinstance(error, OSError) and is_exhausted(error):
                raise DataError(f"{self.sample_id(index)} cannot be read: {problem}") from error
            reason = f"its row group cannot be read: {problem or ' '.join(str(error).split())}"
            raise ImageDecodeError(self.sample_id(index), reason) from error
        data = values[index - int(self._starts[group])].as_py()
        if data is None:
            raise ImageDecodeError(self.sample_id(index), "the row holds no image bytes")
        return decode_rgb(data, self.sample_id(index))

    def sample_id(self, index: int) -> str:
        """`train-00000-of-00001.parquet row 17`, counted from 0 within the file."""
        file, group = self._groups[self._group_of(index)]
        first = self._group_of(index) - group
        return f"{self._names[file]} row {index - int(self._starts[first])}"

    @computed_once
    def fingerprint(self) -> str:
        """SHA-256 over schema, and names, sizes, row counts and row groups of the shards; 32 hexadecimal digits.

        Values that were rewritten with as many bytes go unnoticed.
        """
        digest = hashlib.sha256(self._schema_text.encode())
        for name, file in zip(self._names, self._files, strict=True):
            digest.update(f"{name} {Path(file).stat().st_size}\n".encode())
        digest.update(self._starts.tobytes())
        if not self._is_plain:  # an earlier version read these labels or splits in another way
            digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()[:32]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_caches()

    def _reset_caches(self) -> None:
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._readers: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def _group_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside 0..{len(self) - 1}")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _values(self, group: int) -> pa.ChunkedArray:
        """The image column of one row group, cached."""
        if group not in self._cache:
            while len(self._cache) >= self.chunks.window:
                self._cache.popitem(last=False)
            self._cache[group] = self._read_group(group)
        self._cache.move_to_end(group)
        return self._cache[group]

    def _read_group(self, group: int) -> pa.ChunkedArray:
        file, within = self._groups[group]
        if file not in self._readers:
            while len(self._readers) >= _OPEN_FILES:
                self._readers.popitem(last=False)[1].close()
            self._readers[file] = pq.ParquetFile(self._files[file])
        self._readers.move_to_end(file)
        table = self._readers[file].read_row_group(within, columns=[self._leaves[file]], use_threads=False)
        column = table.column(0)
        return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column

    def _splits(self, files: Sequence[Path], rows: Sequence[int]) -> dict[str, np.ndarray] | None:
        splits: dict[str, list[np.ndarray]] = {}
        first_row = 0
        for file, count in zip(files, rows, strict=True):
            split = split_of_shard(file)
            if split is None:
                return None
            splits.setdefault(split, []).append(np.arange(first_row, first_row + count, dtype=np.int64))
            first_row += count
        return (
            {split: np.concatenate(parts) for split, parts in splits.items()} if "train" in splits else None
        )


@dataclass(frozen=True)
class _Shard:
    """What the footer of a shard tells; the file is closed again.

    rows, group_bytes: of each row group; bytes are those of the image column, uncompressed.
    """

    labels: ShardLabels
    rows: tuple[int, ...]
    group_bytes: tuple[int, ...]
    schema_text: str

    @property
    def columns(self) -> Columns:
        return self.labels.columns


def _read_shards(
    files: Sequence[str], names: Sequence[str], image: str | None, label: str | None
) -> list[_Shard]:
    """The footers of all shards, one file open at a time. The image column is the same in all of them."""
    shards: list[_Shard] = []
    for file, name in zip(files, names, strict=True):
        folder_label = _folder_label(name, label)
        try:
            with pq.ParquetFile(file) as reader:
                schema, metadata = reader.schema_arrow, reader.metadata
        except (pa.ArrowException, OSError) as error:
            problem = system_reason(error) if isinstance(error, OSError) else None
            if problem is not None:
                raise DataError(f"{file} cannot be opened: {problem}") from error
            reason = " ".join(str(error).split())
            raise DataError(
                f"{file} cannot be read as Parquet ({reason}); copy it again or remove it"
            ) from error
        try:
            first = shards[0].columns.image if shards else image
            same = label or next((shard.columns.label for shard in shards if shard.columns.label), None)
            label_column = same if label or same in schema.names else None
            columns = find_columns(schema, name, first, label_column, in_folders=folder_label is not None)
            if same is not None and columns.label != same:  # not another column than the other shards
                columns = replace(columns, label=None, class_names=None)
        except DataError as error:
            if not shards:
                raise
            raise DataError(
                f"{names[0]} and {name} are not of one data set: {error}; set data.source to shards of one data set"
            ) from error
        groups = range(metadata.num_row_groups)
        shards.append(
            _Shard(
                ShardLabels(file, name, metadata.num_rows, columns, folder_label),
                tuple(metadata.row_group(group).num_rows for group in groups),
                tuple(_group_bytes(metadata, group, columns.leaf, name) for group in groups),
                "" if shards else schema.to_string(show_schema_metadata=True),
            )
        )
    return shards


def _folder_label(name: str, label: str | None) -> str | None:
    """The label that a folder `label=NAME` (or, for the column of the settings, `COLUMN=NAME`) tells."""
    values = hive_values(name)
    return next((values[key] for key in ((label,) if label else LABEL_NAMES) if values.get(key)), None)


def _group_bytes(metadata: pq.FileMetaData, group: int, leaf: str, file: str) -> int:
    """Uncompressed size of the image column in one row group. Raises DataError above MAX_GROUP_BYTES."""
    row_group = metadata.row_group(group)
    columns = [row_group.column(c) for c in range(row_group.num_columns)]
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == leaf)
    if size > MAX_GROUP_BYTES:
        raise DataError(
            f"row group {group} of {file} holds {size / 2**30:.1f} GiB of images, and a row group is read as a "
            "whole; rewrite the file with smaller ones: pq.write_table(table, file, row_group_size=500)"
        )
    return int(size)
