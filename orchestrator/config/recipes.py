"""Settings as YAML text, and the recipes that come with the package.

Values are plain dicts, lists and scalars, unchecked. Scalars are read by YAML 1.2's rules (PyYAML alone
follows 1.1): `1e-4` is a number, `yes`, `no` and `2024-01-01` are text. A key that appears twice is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

DEFAULT_RECIPE = "digits_demo"

_SCALARS = (  # YAML 1.2 core schema: tag, pattern, first characters
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class RecipeError(ValueError):
    """A recipe cannot be found or read; one clear sentence."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own way of keeping the table per class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' appears twice", key.start_mark
                )
            seen.add(key.value)
            key.tag = "tag:yaml.org,2002:str"  # a key is text, also `3:` and `null:`
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = {"0x": 16, "0o": 8}.get(text[:2], 10)  # 1.1 would read 010 as eight
    return int(text[2:] if base != 10 else text, base)


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)

_Loader.add_constructor("tag:yaml.org,2002:int", _int)

_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def parse_value(text: str) -> Any:
    """One value as written on the command line. Raises RecipeError if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(_reason(error)) from None


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Nested plain values as YAML that `read_recipe` reads back equal; lists on one line, keys in order."""
    return str(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True))


def bundled_recipes() -> dict[str, str]:
    """The recipes of the package: name -> first comment line, in alphabetical order."""
    names = sorted(
        f.name for f in resources.files("bim.pipelines.recipes").iterdir() if f.name.endswith(".yaml")
    )
    titles = {}
    for name in (n.removesuffix(".yaml") for n in names):
        titles[name] = recipe_text(name).split("\n", 1)[0].removeprefix("#").strip()
    return titles


def recipe_text(name: str) -> str:
    """A bundled recipe with its comments."""
    return (resources.files("bim.pipelines.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def read_recipe(recipe: str) -> dict[str, Any]:
    """The settings of a bundled recipe, by name, or of a YAML file, by path; unchecked.

    Raises:
        RecipeError: no such recipe or file (the nearest name offered), not YAML, a key twice, no mapping.
    """
    bundled = bundled_recipes()
    text = recipe_text(recipe) if recipe in bundled else _file_text(recipe, bundled)
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{recipe} is not valid YAML: {_reason(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(
            f"{recipe} does not hold settings: expected lines such as 'seed: 0' at its top level"
        )
    return values


def _file_text(recipe: str, bundled: Iterable[str]) -> str:
    path = Path(recipe).expanduser()
    if path.is_dir():
        raise RecipeError(f"recipe '{recipe}' is a folder; give the YAML file itself")
    if not path.exists():
        near = difflib.get_close_matches(recipe, bundled, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(f"no recipe and no file is called '{recipe}'{hint} (recipes: {', '.join(bundled)})")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{recipe} is not a text file; a recipe is YAML in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {recipe}: {error.strerror}") from None


def _reason(error: yaml.YAMLError) -> str:
    """PyYAML's several lines as one: where, what."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{where}{problem or str(error).splitlines()[0]}"


SAVED_SETTINGS = "settings.yaml"  # written into every output directory, and read again by --resume
