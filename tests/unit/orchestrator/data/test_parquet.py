from __future__ import annotations

import errno
import json
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
from torch import Tensor

import bim.orchestrator.data.parquet as parquet
from bim.orchestrator.data.errors import DataError, ImageDecodeError
from bim.orchestrator.data.parquet import ParquetSource
from bim.orchestrator.data.sampler import epoch_permutation
from bim.orchestrator.data.splits import make_splits

Make = Callable[..., Path]
Shows = Callable[[Tensor, int], bool]


def hf_metadata(**features: object) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": features}})}


def labels_of(source: ParquetSource) -> list[int]:
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    return source.labels.tolist()


def write(file: Path, metadata: dict[str, str] | None = None, /, **columns: object) -> Path:
    """A Parquet file of columns as long as the first, with an image column that nothing decodes."""
    rows = len(next(iter(columns.values())))  # type: ignore[arg-type]
    table = {"image": [b"x"] * rows} | columns
    columns_given = {name: values for name, values in table.items() if values is not None}
    pq.write_table(pa.table(columns_given).replace_schema_metadata(metadata), file)
    return file


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


def test_labels_and_class_names_come_from_the_hugging_face_metadata(shard: Make):
    meta = hf_metadata(image={"_type": "Image"}, label={"_type": "ClassLabel", "names": ["cat", "dog"]})
    file = shard("a.parquet", range(3), labels=[1, 0, 1], metadata=meta)
    source = ParquetSource(file, [file])
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [1, 0, 1]
    assert source.class_names == ("cat", "dog")


def test_string_labels_are_numbered_by_their_sorted_names(shard: Make):
    files = [
        shard("a.parquet", range(2), labels=["dog", "cat"]),
        shard("b.parquet", range(2), labels=["ant", "dog"]),
    ]
    source = ParquetSource(files[0].parent, files)
    assert source.class_names == ("ant", "cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [2, 1, 0, 2]


def test_rows_without_a_label_keep_those_of_the_others_unless_the_column_is_requested(shard: Make):
    file = shard("a.parquet", range(4), labels=[1, None, -1, 0])
    source = ParquetSource(file, [file])
    assert labels_of(source) == [1, -1, -1, 0]
    assert len(source.notes) == 1
    assert "leaves 2 of 4 rows without a label" in source.notes[0]
    with pytest.raises(DataError, match=r"2 of 4 rows without a label"):
        ParquetSource(file, [file], label_column="label")


def test_a_label_beyond_the_class_names_is_refused(shard: Make):
    meta = hf_metadata(label={"_type": "ClassLabel", "names": ["cat", "dog"]})
    file = shard("a.parquet", range(3), labels=[0, 1, 2], metadata=meta)
    with pytest.raises(DataError, match=r"label 2.*names only 2 classes"):
        ParquetSource(file, [file])


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


@pytest.mark.parametrize(
    ("column", "expected", "names"),
    [
        (pa.array([2, 0, 1], pa.int8()), [2, 0, 1], None),
        (pa.array([2, 0, 1], pa.uint64()), [2, 0, 1], None),
        (pa.array([2.0, None, float("nan")]), [2, -1, -1], None),
        (pa.array([True, False, True]), [1, 0, 1], None),
        (pa.array(["b", "a", None]), [1, 0, -1], ("a", "b")),
        (pa.array(["b", "a", "b"], pa.large_string()), [1, 0, 1], ("a", "b")),
        (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], ("a", "b")),
        (pa.array([7, 5, 7]).dictionary_encode(), [1, 0, 1], None),
        (pa.array([10**12, 5, 10**12]), [1, 0, 1], None),  # identifiers, of which a table of classes would be huge
    ],
)  # fmt: skip
def test_labels_are_taken_in_any_encoding(
    column: pa.Array, expected: list[int], names: tuple[str, ...] | None, tmp_path: Path
):
    file = write(tmp_path / "a.parquet", label=column)
    source = ParquetSource(file, [file])
    assert labels_of(source) == expected
    assert source.class_names == names


@pytest.mark.skipif(not hasattr(pa, "string_view"), reason="this version of pyarrow has no views")
def test_views_of_text_and_bytes_are_read(tmp_path: Path, png_of: Callable[[int], bytes], shows: Shows):
    images = pa.array([png_of(0), png_of(1)], pa.binary_view())
    pq.write_table(pa.table({"image": images, "label": pa.array(["b", "a"], pa.string_view())}),
                   tmp_path / "a.parquet")  # fmt: skip
    source = ParquetSource(tmp_path, [tmp_path / "a.parquet"])
    assert labels_of(source) == [1, 0]
    assert shows(source.load(1), 1)


@pytest.mark.parametrize(
    ("columns", "labels", "note"),
    [
        ({"label": [0.5, 1.0]}, None, "numbers that are not whole, so the images have no labels"),
        ({"label": [[0], [1, 2]]}, None, "not one class per image"),
        ({"label": [None, -1]}, None, "leaves 2 of 2 rows without a label, so the images have no labels"),
        ({"target": [0, 1]}, None, "'target' looks like labels and is not used; --data.label_column target takes it"),
        ({"image_id": [0, 1]}, None, None),
        ({"label": [0, 1], "target": [1, 0]}, [0, 1], None),
    ],
)  # fmt: skip
def test_what_looks_like_labels_and_is_not_used_is_told_in_one_note(
    columns: dict[str, list[object]], labels: list[int] | None, note: str | None, tmp_path: Path
):
    file = write(tmp_path / "a.parquet", **columns)
    source = ParquetSource(file, [file])
    assert (source.labels is None) if labels is None else (labels_of(source) == labels)
    assert len(source.notes) == (note is not None)
    assert note is None or note in source.notes[0]


def test_of_several_class_columns_the_finest_is_taken_and_told(shard: Make, tmp_path: Path):
    coarse = {"_type": "ClassLabel", "names": ["animal", "thing"]}
    fine = {"_type": "ClassLabel", "names": ["cat", "cup", "dog"]}
    file = write(tmp_path / "a.parquet", hf_metadata(coarse_label=coarse, fine_label=fine),
                 coarse_label=[0, 1], fine_label=[2, 1])  # fmt: skip
    source = ParquetSource(file, [file])
    assert (labels_of(source), source.class_names) == ([2, 1], ("cat", "cup", "dog"))
    assert source.notes == (
        "coarse_label and fine_label hold classes; 'fine_label' is taken as the label, --data.label_column names another",
    )


def test_folders_in_the_style_of_hive_hold_labels_and_splits(shard: Make):
    files = [
        shard("split=test/label=cat/0.parquet", range(1)),
        shard("split=train/label=a%20dog/0.parquet", range(2)),
        shard("split=train/label=cat/0.parquet", range(1)),
    ]
    source = ParquetSource(files[0].parents[2], files)
    assert (labels_of(source), source.class_names) == ([1, 0, 0, 1], ("a dog", "cat"))
    assert source.fixed_splits is not None
    assert {name: part.tolist() for name, part in source.fixed_splits.items()} == {
        "test": [0],
        "train": [1, 2, 3],
    }


def test_a_shard_without_labels_leaves_those_of_the_others(shard: Make):
    files = [shard("test-0.parquet", range(2)), shard("train-0.parquet", range(3), labels=[0, 1, 0])]
    source = ParquetSource(files[0].parent, files)
    assert labels_of(source) == [-1, -1, 0, 1, 0]
    with pytest.raises(DataError, match=r"no column 'label'"):
        ParquetSource(files[0].parent, files, label_column="label")


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


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (pa.array([2**64 - 1, 1], pa.uint64()), "numbers of more than 63 bits"),
        (pa.array([b"\xff", b"cat"], pa.binary()).view(pa.string()), "text that is not UTF-8"),
        (pa.array([float("inf"), 1.0]), "numbers that are not whole"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_values_that_cannot_be_classes_are_told_and_refused_where_the_column_is_requested(
    tmp_path: Path, values: pa.Array, told: str
) -> None:
    file = write(tmp_path / "a.parquet", label=values)
    source = ParquetSource(file, [file])
    assert source.labels is None
    (note,) = source.notes
    assert note == f"column 'label' of a.parquet holds {told}, so the images have no labels"
    with pytest.raises(DataError, match=f"holds {told}; set data.label_column"):
        ParquetSource(file, [file], label_column="label")


def test_a_label_column_that_is_damaged_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"image": [b"x"] * 50, "label": list(range(50))})
    pq.write_table(table, file, compression="none", use_dictionary=False)
    start = pq.ParquetFile(file).metadata.row_group(0).column(1).data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 25] = b"\xff" * 25
    file.write_bytes(content)
    with pytest.raises(
        DataError, match=r"column 'label' of .*a\.parquet cannot be read: .*; copy it again or remove it"
    ):
        ParquetSource(file, [file])
