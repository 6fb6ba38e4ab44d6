"""Labels, class names and splits that Parquet files hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.parquet import ParquetSource
from tests.unit.orchestrator.data.parquet_files import Make, hf_metadata, labels_of, write


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
