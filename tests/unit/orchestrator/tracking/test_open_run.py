"""Which errors of a store are an answer to the content of an upload."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INTERNAL_ERROR, INVALID_PARAMETER_VALUE

from bim.orchestrator.tracking.open_run import is_refusal


@pytest.mark.parametrize("code", [BAD_REQUEST, INVALID_PARAMETER_VALUE])
def test_an_upload_whose_content_is_wrong_is_refused(code: int) -> None:
    assert is_refusal(MlflowException("the value is too long", error_code=code))


@pytest.mark.parametrize(
    "text",
    [
        "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id, datasets.name",
        '(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint "datasets_pk"',
        "(pymysql.err.IntegrityError) (1062, \"Duplicate entry '1-digits' for key 'PRIMARY'\")",
    ],
)
def test_two_writers_of_one_row_are_no_refusal(text: str) -> None:
    assert not is_refusal(MlflowException(text, error_code=BAD_REQUEST))


def test_a_store_that_fails_is_no_refusal() -> None:
    assert not is_refusal(MlflowException("out of order", error_code=INTERNAL_ERROR))
    assert not is_refusal(OSError("connection reset"))
