from __future__ import annotations

import errno
import os
import pickle
import re
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bim.orchestrator.data.parquet as parquet
from bim.orchestrator.data.errors import DataError, ImageDecodeError
from bim.orchestrator.data.parquet import ParquetSource
from bim.orchestrator.data.sampler import epoch_permutation
from bim.orchestrator.data.splits import make_splits
from tests.unit.orchestrator.data.parquet_files import Make, Shows, labels_of, write


class CountingSource(ParquetSource):
    """Counts how often a row group is read from the disk."""

    reads = 0

    def _read_group(self, group: int) -> pa.ChunkedArray:
        self.reads += 1
        return super()._read_group(group)


def test_rows_of_all_shards_are_numbered_in_order(shard: Make, shows: Shows):
    files = [shard("a.parquet", range(6)), shard("b.parquet", range(6, 9), plain=False)]
    source = ParquetSource(files[0].parent, files)
    assert len(source) == 9
    for number in (0, 3, 4, 5, 6, 8):
        assert shows(source.load(number), number)
    assert source.sample_id(5) == "a.parquet row 5"
    assert source.sample_id(7) == "b.parquet row 1"
    assert source.labels is source.class_names is source.fixed_splits is None


def test_plain_binary_column_is_read(shard: Make, shows: Shows):
    file = shard("a.parquet", range(6), plain=True)
    assert shows(ParquetSource(file, [file]).load(5), 5)


def test_without_image_column_the_columns_are_listed(tmp_path: Path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "label": [1]}), file)
    with pytest.raises(
        DataError, match=r"a\.parquet has no image column .*it has text: string, label: int64"
    ):
        ParquetSource(file, [file])


def test_the_image_column_can_be_named_and_is_checked(
    tmp_path: Path, shows: Shows, png_of: Callable[[int], bytes]
):
    file = tmp_path / "a.parquet"
    files = [png_of(0)], [png_of(1)]
    pq.write_table(pa.table({"left": files[0], "right": files[1], "n": [1]}), file)
    with pytest.raises(DataError, match=r"several columns .* data\.image_column"):
        ParquetSource(file, [file])
    assert shows(ParquetSource(file, [file], "right").load(0), 1)
    with pytest.raises(DataError, match=r"no column 'middle'.*it has left: binary"):
        ParquetSource(file, [file], "middle")
    with pytest.raises(DataError, match=r"'n' .* holds no image bytes"):
        ParquetSource(file, [file], "n")
    with pytest.raises(DataError, match=r"no column 'kind'"):
        ParquetSource(file, [file], "left", "kind")
    with pytest.raises(DataError, match=r"neither integers nor strings"):
        ParquetSource(file, [file], "left", "right")


@pytest.mark.skipif(not hasattr(pa, "string_view"), reason="this version of pyarrow has no views")
def test_views_of_text_and_bytes_are_read(tmp_path: Path, png_of: Callable[[int], bytes], shows: Shows):
    images = pa.array([png_of(0), png_of(1)], pa.binary_view())
    pq.write_table(pa.table({"image": images, "label": pa.array(["b", "a"], pa.string_view())}),
                   tmp_path / "a.parquet")  # fmt: skip
    source = ParquetSource(tmp_path, [tmp_path / "a.parquet"])
    assert labels_of(source) == [1, 0]
    assert shows(source.load(1), 1)


def test_shards_of_other_widths_and_encodings_are_read_as_one_data_set(tmp_path: Path, png_of, shows: Shows):
    struct = pa.array(
        [{"bytes": png_of(0), "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    tables = [
        pa.table({"image": struct, "label": pa.array(["b"])}),
        pa.table({"image": pa.array([png_of(1)], pa.large_binary()), "label": pa.array(["a"]).dictionary_encode()}),
        pa.table({"label": pa.array(["b"], pa.large_string()), "image": pa.array([png_of(2)], pa.binary())}),
    ]  # fmt: skip
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    for table, file in zip(tables, files, strict=True):
        pq.write_table(table, file)
    source = ParquetSource(tmp_path, files)
    assert labels_of(source) == [1, 0, 1]
    assert all(shows(pickle.loads(pickle.dumps(source)).load(number), number) for number in range(3))


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ({"label": ["cat"]}, "b.parquet has strings for labels and a.parquet numbers, which cannot be compared"),
        ({"image": ["text"]}, "a.parquet and b.parquet are not of one data set: column 'image' of b.parquet holds no image"),
        ({"image": None, "photo": [b"x"]}, "a.parquet and b.parquet are not of one data set: b.parquet has no column"),
        ({"label": [[0]]}, "a.parquet and b.parquet are not of one data set: column 'label' of b.parquet holds list"),
    ],
)  # fmt: skip
def test_shards_that_cannot_be_cast_are_refused_and_both_are_named(
    second: dict[str, object], problem: str, tmp_path: Path
):
    files = [
        write(tmp_path / "a.parquet", label=[0]),
        write(tmp_path / "b.parquet", **({"label": [0]} | second)),
    ]
    with pytest.raises(DataError, match=re.escape(problem)):
        ParquetSource(tmp_path, files)


def test_more_shards_than_open_files_are_allowed_can_be_read(shard: Make):
    files = [shard(f"{number:03d}.parquet", range(1), labels=[number % 3]) for number in range(40)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
        assert len(labels_of(ParquetSource(files[0].parent, files))) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_what_the_system_refuses_is_not_called_damaged(
    number: int, shard: Make, monkeypatch: pytest.MonkeyPatch
):
    file = shard("a.parquet", range(1))

    def refused(path: str) -> pq.ParquetFile:
        raise OSError(number, f"Failed to open local file '{path}'")

    monkeypatch.setattr(parquet.pq, "ParquetFile", refused)
    with pytest.raises(DataError, match=f"cannot be opened: {os.strerror(number)}; ") as caught:
        ParquetSource(file, [file])
    assert "Parquet" not in str(caught.value)


def test_a_file_that_is_no_parquet_or_has_no_rows_is_refused(tmp_path: Path, shard: Make):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match=r"cannot be read as Parquet"):
        ParquetSource(file, [file])
    file = shard("b.parquet", range(0))
    with pytest.raises(DataError, match=r"no rows"):
        ParquetSource(file, [file])


def test_a_row_group_too_large_to_hold_is_refused_with_the_remedy(
    shard: Make, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    file = shard("a.parquet", range(3))
    with pytest.raises(DataError, match=r"row group 0 of a.parquet .*row_group_size=500"):
        ParquetSource(file, [file])


def test_rows_without_bytes_and_damaged_rows_are_bad_images(tmp_path: Path):
    file = tmp_path / "a.parquet"
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [None, {"bytes": None, "path": "a.png"}, {"bytes": b"junk", "path": None}]
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), file)
    source = ParquetSource(file, [file])
    for index, reason in enumerate(("no image bytes", "no image bytes", "none of BMP")):
        with pytest.raises(ImageDecodeError, match=f"a.parquet row {index}: .*{reason}"):
            source.load(index)


def test_a_damaged_row_group_makes_its_rows_bad_and_no_others(shard: Make):
    file = shard("a.parquet", range(8))
    data = bytearray(file.read_bytes())
    chunk = pq.ParquetFile(file).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    file.write_bytes(data)
    source = ParquetSource(file, [file])
    source.load(3)
    with pytest.raises(ImageDecodeError, match=r"row 5: its row group cannot be read"):
        source.load(5)


def test_shard_names_are_fixed_splits_and_val_is_cut_from_train(shard: Make):
    files = [shard("test-00000-of-00001.parquet", range(5)), shard("train-00000-of-00001.parquet", range(20))]
    source = ParquetSource(files[0].parent, files)
    splits = make_splits(source, 0, val_fraction=0.25, test_fraction=0.5)
    assert splits.test.tolist() == [0, 1, 2, 3, 4]
    assert len(splits.val) == 5
    assert sorted([*splits.train, *splits.val]) == list(range(5, 25))


def test_an_epoch_reads_each_row_group_once_however_small_the_cache(shard: Make):
    file = shard("a.parquet", range(40), group=4)  # ten row groups
    one_group = pq.ParquetFile(file).metadata.row_group(0).total_byte_size
    source = CountingSource(file, [file], cache_bytes=3 * one_group + one_group // 2)
    assert source.chunks.window in (2, 3)
    for index in epoch_permutation(np.arange(40), 0, 0, source.chunks):
        source.load(int(index))
    assert source.reads == 10


def test_a_copy_carries_no_image_data_and_reads_anew(shard: Make, shows: Shows):
    file = shard("a.parquet", range(40))
    source = ParquetSource(file, [file])
    source.load(0)
    state = pickle.dumps(source)
    assert len(state) < 5_000
    assert shows(pickle.loads(state).load(39), 39)


def test_fingerprint_follows_the_data_and_not_the_place(shard: Make):
    prints = [
        ParquetSource(file, [file]).fingerprint()
        for file in (
            shard("one/a.parquet", range(4)),
            shard("two/a.parquet", range(4)),
            shard("three/a.parquet", range(5)),
            shard("four/a.parquet", range(4), group=2),
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
