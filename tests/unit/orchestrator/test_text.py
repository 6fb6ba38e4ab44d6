"""Numbers, durations and long lines as text."""

from __future__ import annotations

import pytest

from bim.orchestrator.text import duration, first_line, params_text, three_digits, wrapped


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (72, "1 min 12 s"),
        (120, "2 min"),
        (7200, "2 h"),
        (3600 * 3 + 305, "3 h 05 min"),
        (86400 * 2 + 3600 * 4, "2 d 04 h"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00001234, "0.000012"), (0.5, "0.500"), (9.999, "10.0"), (99.96, "100"), (1234.5, "1234")],
)
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.parametrize(
    ("params", "text"),
    [(12_345, "12.3 k"), (230_000, "0.230 M"), (5_500_000, "5.50 M"), (304_300_000, "304 M")],
)
def test_parameters_are_thousands_or_millions(params: int, text: str) -> None:
    assert params_text(params) == text


def test_long_lines_are_broken_but_never_inside_a_list() -> None:
    text = "trial 2: mask.ratio 0.6, decoder.throw_ratio 0.5, schedule.resolution [[0, 16], [0.25, 24], [0.5, 32]]"
    assert [line.strip() for line in wrapped(text)] == [
        "trial 2: mask.ratio 0.6, decoder.throw_ratio 0.5, schedule.resolution",
        "[[0, 16], [0.25, 24], [0.5, 32]]",
    ]


def test_an_error_is_its_first_line_or_nothing() -> None:
    assert first_line(ValueError("\n one \ntwo")) == "one"
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == ""
