from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.recipes import RecipeError, bundled_recipes, dump_yaml, parse_value, read_recipe
from bim.orchestrator.config.schema import SettingsError, all_settings
from bim.orchestrator.config.transforms import settings_to_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("-1", -1),
        ("010", 10),
        ("0x10", 16),
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("'4'", "4"),
        ("[3, 3.5, x]", [3, 3.5, "x"]),
        ("{depth: 8}", {"depth": 8}),
        ("{3: a, null: b}", {"3": "a", "null": "b"}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["[3,", "!!python/name:os.system x", "*x", "{a: 1, a: 2}"])
def test_what_is_not_plain_yaml_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_value(text)


@pytest.mark.parametrize(
    "value", ["yes", "1e-4", "010", "", " x", "null", "a: b", "#", "[", "2024-01-01", "é", "a\nb"]
)
def test_text_is_written_so_that_it_is_read_as_text(value: str) -> None:
    assert parse_value(dump_yaml({"key": value})) == {"key": value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: x\nname: y\n", "is not valid YAML: line 2, column 1: 'name' appears twice"),
        (b"a:\n  b: 1\n  b: 2\n", "is not valid YAML: line 3, column 3: 'b' appears twice"),
        (b"name: [x\ny: 3", "is not valid YAML: line 2, column 2: expected ',' or ']', but got ':'"),
        (b"- 3\n", "does not hold settings: expected lines such as 'seed: 0' at its top level"),
        (b"\x93NUMPY\xff", "is not a text file; a recipe is YAML in UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_recipe(str(file))
    assert str(caught.value) == f"{file} {message}"


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder; give the YAML file itself"):
        read_recipe(str(tmp_path))


def test_an_empty_file_holds_no_settings(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert read_recipe(str(file)) == {}


def test_every_bundled_recipe_begins_with_its_title_and_is_named_like_its_file() -> None:
    for name, title in bundled_recipes().items():
        assert title
        assert read_recipe(name)["name"] == name


SMALL = st.sampled_from(list("ab0-:,[]{}&*!?|>#'\"% \n\t.~<")) | st.sampled_from(
    [
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!map ",
        "- ",
        ": ",
        "1e999",
        "0x",
        ".nan",
        "\x00",
        "\ud800",
        "\ufeff",
        "---\n",
        "...",
    ]
)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(st.lists(SMALL, max_size=40).map("".join))
def test_any_text_is_a_plain_value_or_one_sentence(text: str) -> None:
    problem = ""
    try:
        json.dumps(parse_value(text))  # a plain value that does not contain itself
    except RecipeError as error:
        problem = str(error)
    assert len(problem.splitlines()) <= 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    st.sampled_from(sorted(all_settings())), st.none() | VALUES.map(json.dumps) | st.text(max_size=12)
)
def test_any_value_of_any_setting_is_taken_or_refused_in_sentences(key: str, text: str | None) -> None:
    argv = [f"--{key}"] if text is None else [f"--{key}={text}"]
    problem = ""
    try:
        settings_to_yaml(load_settings(argv)).encode()
    except SettingsError as error:
        problem = str(error)
    assert all(line and line.isprintable() for line in problem.splitlines())
