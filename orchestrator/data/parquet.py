"""Images in Parquet shards (Hugging Face's, or any with a binary column), read with pyarrow by row groups.

A process keeps `chunks.window` row groups (as many as fit CACHE_BYTES), and the permutation of an epoch stays inside
such a window, so a process reads each row group at most once per epoch. Every worker reads every window, so W workers
read the bytes of an epoch W times (mostly from the page cache). Measured on 1,649 photographs in 9 row groups: 9 reads
per epoch for any window. A full permutation needs 0.53 reads per image with 4 row groups in memory and 0.89 with one,
and then spends more time on reading than on decoding."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from bim.orchestrator.data.decode import decode_rgb
from bim.orchestrator.data.errors import DataError, ImageDecodeError
from bim.orchestrator.data.file_listing import split_of_shard
from bim.orchestrator.data.parquet_columns import Columns, find_columns
from bim.orchestrator.data.sampler import Chunks

CACHE_BYTES = 256 * 2**20  # per process; at 110 KB per image a window of about 2,400 images
MAX_GROUP_BYTES = 2**30  # every worker reads a row group as a whole
_OPEN_FILES = 16

_log = logging.getLogger(__name__)


class ParquetSource:
    """Rows of one or more shards, in the order of the file names, as images.

    The image column is Hugging Face's struct<bytes, path> or plain binary. Labels: an integer column (class names
    from the Hugging Face metadata, if any) or strings (classes numbered by their sorted names); a column that
    the settings do not name and that leaves some rows unlabeled (null or negative) is not used, with a warning.
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
        readers = [_open(file) for file in self._files]
        self._columns, self._schema_text = _common_columns(readers, self._names, image_column, label_column)

        sizes: list[int] = []
        in_file: list[tuple[int, int]] = []  # (file, row group within it) of each row group
        group_bytes = [0]
        for number, reader in enumerate(readers):
            for group in range(reader.metadata.num_row_groups):
                sizes.append(reader.metadata.row_group(group).num_rows)
                in_file.append((number, group))
                group_bytes.append(_group_bytes(reader, group, self._columns.leaf, self._names[number]))
        self._groups = tuple(in_file)
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        if not len(self):
            raise DataError(f"{root} has no rows; set data.source to Parquet files that hold images")
        self.chunks = Chunks(self._starts, window=max(1, cache_bytes // max(1, *group_bytes)))
        self.fixed_splits = self._splits(files, [reader.metadata.num_rows for reader in readers])
        self.labels, self.class_names = self._read_labels(readers, is_requested=label_column is not None)
        self._reset_caches()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def load(self, index: int) -> Tensor:
        """-> (3, H, W) uint8. Raises ImageDecodeError, also for a row without bytes or in a damaged row group."""
        group = self._group_of(index)
        try:
            values = self._values(group)
        except (pa.ArrowException, OSError) as error:
            reason = f"its row group cannot be read: {' '.join(str(error).split())}"
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

    def fingerprint(self) -> str:
        """SHA-256 over schema, and names, sizes, row counts and row groups of the shards; 32 hexadecimal digits."""
        digest = hashlib.sha256(self._schema_text.encode())
        for name, file in zip(self._names, self._files, strict=True):
            digest.update(f"{name} {Path(file).stat().st_size}\n".encode())
        digest.update(self._starts.tobytes())
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
        table = self._readers[file].read_row_group(within, columns=[self._columns.leaf], use_threads=False)
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

    def _read_labels(
        self, readers: Sequence[pq.ParquetFile], is_requested: bool
    ) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
        column = self._columns.label
        if column is None:
            return None, None
        values = pa.chunked_array([c for r in readers for c in r.read(columns=[column]).column(0).chunks])
        names = self._columns.class_names
        if not pa.types.is_integer(values.type):
            names = tuple(sorted(pc.unique(values.drop_null()).to_pylist()))
            values = pc.index_in(values, value_set=pa.array(names, type=values.type))
        labels = values.cast(pa.int64()).fill_null(-1).to_numpy().astype(np.int64)
        if unlabeled := int((labels < 0).sum()):
            problem = (
                f"column {column!r} of {self.name} leaves {unlabeled} of {len(labels)} rows without a label"
            )
            if is_requested:
                raise DataError(f"{problem} (null or negative); label them or leave data.label_column unset")
            _log.warning("%s; the images are used without labels", problem)
            return None, None
        if names is not None and labels.max() >= len(names):
            raise DataError(
                f"column {column!r} of {self.name} holds label {labels.max()}, but its metadata names only "
                f"{len(names)} classes; correct the file, or set data.label_column to another column"
            )
        return labels, names


def _open(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file} cannot be read as Parquet ({reason}); copy it again or remove it") from error


def _common_columns(
    readers: Sequence[pq.ParquetFile], names: Sequence[str], image: str | None, label: str | None
) -> tuple[Columns, str]:
    """The columns, equal in all shards, and the first shard's schema as text."""
    first = find_columns(readers[0].schema_arrow, names[0], image, label)
    for reader, name in zip(readers[1:], names[1:], strict=True):
        other = find_columns(reader.schema_arrow, name, image, label)
        if other != first:
            raise DataError(
                f"{names[0]} and {name} differ in their image column, label column or class names "
                f"({first} and {other}); set data.source to shards of one data set"
            )
    return first, readers[0].schema_arrow.to_string(show_schema_metadata=True)


def _group_bytes(reader: pq.ParquetFile, group: int, leaf: str, file: str) -> int:
    """Uncompressed size of the image column in one row group. Raises DataError above MAX_GROUP_BYTES."""
    row_group = reader.metadata.row_group(group)
    columns = [row_group.column(c) for c in range(row_group.num_columns)]
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == leaf)
    if size > MAX_GROUP_BYTES:
        raise DataError(
            f"row group {group} of {file} holds {size / 2**30:.1f} GiB of images, and a row group is read as a "
            "whole; rewrite the file with smaller ones: pq.write_table(table, file, row_group_size=500)"
        )
    return int(size)
