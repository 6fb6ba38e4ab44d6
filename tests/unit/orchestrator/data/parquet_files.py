"""Parquet files for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from bim.orchestrator.data.parquet import ParquetSource

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
