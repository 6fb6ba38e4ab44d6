"""Small image files, folders and Parquet shards for the tests of this folder, written without the package."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import Tensor


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """(H, W, 3) or (H, W) uint8 -> bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def picture(number: int, height: int = 9, width: int = 12) -> np.ndarray:
    """(H, W, 3) uint8, different for every number."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def png_of() -> Callable[[int], bytes]:
    """The file that the folders and shards below hold as picture number n."""
    return lambda number: encoded(picture(number))


@pytest.fixture
def shows() -> Callable[[Tensor, int], bool]:
    """Whether a decoded image, (3, H, W), is picture number n."""
    return lambda image, number: np.array_equal(image.permute(1, 2, 0).numpy(), picture(number))


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(*names: str, damaged: tuple[str, ...] = (), root: str = "images") -> Path:
        """Write one picture per name, picture(0), picture(1), ...; those in `damaged` are cut short."""
        folder = tmp_path / root
        for number, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            data = encoded(picture(number))
            path.write_bytes(data[: len(data) // 2] if name in damaged else data)
        return folder

    return make


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    def make(
        name: str,
        numbers: range,
        group: int = 4,
        labels: list[object] | None = None,
        metadata: dict[str, str] | None = None,
        plain: bool = False,
    ) -> Path:
        """A Parquet file with picture(n) for n in numbers, `group` rows per row group."""
        files = [encoded(picture(n)) for n in numbers]
        if plain:
            images = pa.array(files, type=pa.binary())
        else:
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            images = pa.array(
                [{"bytes": data, "path": f"{n}.png"} for n, data in zip(numbers, files, strict=True)], kind
            )
        columns = {"image": images}
        if labels is not None:
            columns["label"] = pa.array(labels)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=group)
        return path

    return make
