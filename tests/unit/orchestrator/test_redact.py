"""Passwords and tokens of URIs are taken out of every text that leaves the process."""

from __future__ import annotations

import pytest

from bim.orchestrator.text import is_redacted, printable, redact


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("http://ada:hunter2@host:5000/x", "hunter2"),
        ("https://ghp_hunter2@github.com/a/b.git", "hunter2"),
        ("https://hunter2:x-oauth-basic@github.com/a/b.git", "hunter2"),
        ("git+https://oauth2:hunter2@gitlab.com/a/b", "hunter2"),
        ("postgresql://ada:hun@ter/2@db:5432/ml", "ter/2"),
        ("postgresql://ada:12345@db/ml", "12345"),
        ("mysql+pymysql://ada:hunt%40er2@db/ml", "hunt"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dhunter2", "hunter2"),
        ("redis://:hunter2@cache", "hunter2"),
        ("s3://AKIA:hunter2@bucket/x", "hunter2"),
        ("https://bucket/x?region=eu&X-Amz-Signature=hunter2&a=1", "hunter2"),
        ("https://host/callback#access_token=hunter2", "hunter2"),
        ("az://box/x?sv=1&sig=hunter2", "hunter2"),
        ("no route to 'http://ada:hunter2@h' (asked http://b:hunter2@c)", "hunter2"),
        ("--tracking.uri=postgresql://ada:hunter2@db/ml", "hunter2"),
    ],
)
def test_no_secret_is_left_and_that_something_is_missing_can_be_told(text: str, secret: str) -> None:
    assert secret not in redact(text)
    assert is_redacted(redact(text))
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:5000/#/experiments/1/runs/2?workflowType=machine_learning",
        "sqlite:////home/ada/mlflow.db?timeout=3",
        "ssh://git@github.com/a/b",
        "s3://bucket/dir:v1@2",
        "http://host:5000/a@b",
        "postgresql://ada@db/ml",
        "epoch 3/60  loss by block 0.7 0.6",
        "local-dir:/data/x",
    ],
)
def test_what_has_no_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text
    assert not is_redacted(text)


def test_bytes_of_a_file_name_that_are_not_utf8_are_shown_as_escapes() -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert printable(name) == r"caf\xe9.png"
    assert printable("café.png") == "café.png"
    printable("\ud800").encode()
