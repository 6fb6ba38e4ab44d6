from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.folder import FolderSource
from bim.orchestrator.data.parquet import ParquetSource
from bim.orchestrator.data.source import open_source

Make = Callable[..., Path]


def test_each_kind_of_source_is_opened(image_folder: Make, shard: Make):
    assert isinstance(open_source("digits"), DigitsSource)
    assert isinstance(open_source(str(image_folder("a.png"))), FolderSource)
    file = shard("shards/deep/a.parquet", range(2))
    assert isinstance(open_source(str(file)), ParquetSource)
    assert isinstance(open_source(str(file.parent.parent)), ParquetSource)


def test_a_missing_path_is_named():
    with pytest.raises(DataError, match="'/no/such/folder' does not exist"):
        open_source("/no/such/folder")


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(DataError, match="'' does not exist"):
        open_source("")


def test_a_single_image_file_is_refused(image_folder: Make):
    with pytest.raises(DataError, match=r"is a file, but not \.parquet"):
        open_source(str(image_folder("a.png") / "a.png"))


def test_a_folder_of_both_kinds_is_refused_but_image_metadata_is_none(image_folder: Make, shard: Make):
    folder = image_folder("a.png")
    shard("images/metadata.parquet", range(1))
    assert isinstance(open_source(str(folder)), FolderSource)
    shard("images/b.parquet", range(1))
    with pytest.raises(DataError, match=r"holds Parquet files \(b\.parquet\) and images \(a\.png\)"):
        open_source(str(folder))


def test_columns_are_refused_for_other_sources(image_folder: Make):
    for source in ("digits", str(image_folder("a.png"))):
        with pytest.raises(DataError, match="apply to Parquet"):
            open_source(source, image_column="image")


def test_digits_takes_no_argument():
    with pytest.raises(DataError, match="'digits' takes no argument, got '8'"):
        open_source("digits:8")


def test_folder_without_images_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds no images"):
        open_source(str(tmp_path))
