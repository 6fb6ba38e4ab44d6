"""Settings as YAML text, and the recipes that come with the package.

Values are plain dicts, lists and scalars, unchecked. Scalars are read by YAML 1.2's rules (PyYAML alone
follows 1.1): `1e-4` is a number, `yes`, `no` and `2024-01-01` are text. A key that appears twice is an error.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import yaml

from bim.orchestrator.config.messages import format_value, printable

DEFAULT_RECIPE = "digits_demo"

SAVED_SETTINGS = "settings.yaml"
"""Written into every output directory, and read again by --resume."""

# YAML 1.2 core schema: tag, pattern, first characters.
_SCALARS = (
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


MAX_BYTES = 256 * 1024
MAX_DEPTH = 30
MAX_NODES = 20_000
MAX_DIGITS = 30
"""Bounds of a recipe: size of the file, levels, values, and digits of a whole number."""


class RecipeError(ValueError):
    """A recipe cannot be found or read; one clear sentence."""


class BoundsError(RecipeError):
    """A value is nested too deeply, too large, or contains itself."""


class _OutOfBoundsError(yaml.MarkedYAMLError):
    """The same while a text is parsed."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: no other tags, no value that contains itself, and bounds on depth, size and numbers."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (declared so in the stubs)
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise _OutOfBoundsError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def single_value(self) -> Any:
        """The one value of the text. Raises yaml.YAMLError."""
        node = self.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # `!!map` before a scalar
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' appears twice", key.start_mark
                )
            seen.add(key.value)
            key.tag = "tag:yaml.org,2002:str"  # a key is text, also `3:` and `null:`
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float | bool | None:
        """A scalar that is no text; an explicit tag, such as `!!int`, may stand before one that does not match it."""
        kind, text = node.tag.rsplit(":", 1)[1], str(self.construct_scalar(node))
        if not _PATTERNS[kind].match(text):
            raise yaml.constructor.ConstructorError(
                None, None, f"{text[:30]!r} is no {kind}", node.start_mark
            )
        if kind == "int":
            return _int(text, node)
        if kind == "float":
            return float(self.construct_yaml_float(node))
        return None if kind == "null" else text.lower() == "true"


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (declared so in the stubs)


def _int(text: str, node: yaml.ScalarNode) -> int:
    base = {"0x": 16, "0o": 8}.get(text[:2], 10)  # 1.1 would read 010 as eight
    value = int(text[2:] if base != 10 else text, base) if len(text) <= MAX_DIGITS else None
    if value is None or abs(value) >= 2**63:
        shown = text if len(text) <= MAX_DIGITS else f"a number of {len(text)} digits"
        problem = f"{shown} is too large; whole numbers have at most 63 bits"
        raise _OutOfBoundsError(None, None, problem, node.start_mark)
    return value


def _check_size(root: yaml.Node) -> None:
    """Raise yaml.YAMLError for a value that contains itself, or that is too large once its aliases are written out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        key = id(node)
        if sizes.get(key) == 0:  # being counted: it is inside itself
            raise _OutOfBoundsError(None, None, "a value contains itself", node.start_mark)
        if key not in sizes:
            sizes[key] = 0
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            parts = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
            sizes[key] = 1 + sum(size(part) for part in parts)
        if sizes[key] > MAX_NODES:
            raise _OutOfBoundsError(
                None, None, f"more than {MAX_NODES} values, with aliases written out", node.start_mark
            )
        return sizes[key]

    size(root)


_PATTERNS: dict[str, re.Pattern[str]] = {}
for _tag, _pattern, _first in _SCALARS:
    _PATTERNS[_tag] = re.compile(f"^(?:{_pattern})$")
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _PATTERNS[_tag], _first)

for _tag in ("null", "bool", "int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
for _tag in ("str", "seq", "map"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", getattr(_Loader, f"construct_yaml_{_tag}"))
_Loader.add_constructor(None, _Loader.construct_undefined)  # type: ignore[type-var]

_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def parse_value(text: str) -> Any:
    """One value as written on the command line. Raises RecipeError if it is not YAML."""
    return _read(text)


def _read(text: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            return loader.single_value()
        finally:
            loader.dispose()
    except _OutOfBoundsError as error:
        raise BoundsError(_reason(error)) from None
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
        values = _read(text)
    except RecipeError as error:
        raise RecipeError(f"{recipe} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(
            f"{recipe} does not hold settings: expected lines such as 'seed: 0' at its top level"
        )
    return values


def _file_text(recipe: str, bundled: Iterable[str]) -> str:
    shown = format_value(recipe)
    try:
        path = Path(recipe).expanduser()
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        near = difflib.get_close_matches(recipe[:100], bundled, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(
            f"no recipe and no file is called {shown}{hint} (recipes: {', '.join(bundled)})"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        # A name too long, no permission, a NUL, no such user.
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"cannot read the recipe {shown}: {reason}") from None
    if stat.S_ISDIR(mode):
        raise RecipeError(f"recipe {shown} is a folder; give the YAML file itself")
    is_piped = path.as_posix() == "/dev/stdin" or path.as_posix().startswith("/dev/fd/")
    if not (stat.S_ISREG(mode) or (is_piped and stat.S_ISFIFO(mode))):
        raise RecipeError(f"recipe {shown} is a device or a pipe; give a YAML file")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {shown}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{shown} has more than {MAX_BYTES // 1024} KiB, which is no recipe")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{printable(recipe)} is not a text file; a recipe is YAML in UTF-8") from None


def _reason(error: yaml.YAMLError) -> str:
    """PyYAML's several lines as one: where, what."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{where}{problem or str(error).splitlines()[0]}"
