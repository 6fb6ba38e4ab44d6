"""What a setting may be and what is wrong with one, in words, for `--help` and for errors.

Pure functions over the JSON schema of the settings and the list of errors of pydantic.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SettingInfo:
    """One setting, as `--help` and error messages show it.

    Args:
        key: dotted name, `mask.ratio`; `section` is what stands before the last dot, "" at the top level.
        kind: short word for the type, `NUMBER`, `INT|LIST`, `auto|fp32|bf16|fp16`.
        allowed: what a value may be, to be read after "must be".
        description: what it does, with its unit.
        is_text: the command line's text is the value itself and is not read as YAML.
        is_flag: a boolean, which may stand on the command line without a value.
        is_open: a mapping with keys of its own below this one.
        nullable: null is allowed.
        required: a recipe must give it.
    """

    key: str
    section: str
    kind: str
    allowed: str
    description: str
    is_text: bool
    is_flag: bool
    is_open: bool
    nullable: bool
    required: bool


def setting_infos(schema: Mapping[str, Any]) -> dict[str, SettingInfo]:
    """Every setting of a JSON schema with one level of sections (`$ref`s), by dotted key, in field order."""
    infos = {}

    def visit(properties: Mapping[str, Any], required: Iterable[str], section: str) -> None:
        for name, entry in properties.items():
            if reference := _reference(entry):
                inner = schema["$defs"][reference.rsplit("/", 1)[1]]
                visit(inner["properties"], inner.get("required", ()), name)
            else:
                key = f"{section}.{name}" if section else name
                infos[key] = _info(key, section, entry, name in required)

    visit(schema["properties"], schema.get("required", ()), "")
    return infos


def section_titles(schema: Mapping[str, Any]) -> dict[str, str]:
    """Section -> what it is about."""
    return {
        name: entry.get("description", "")
        for name, entry in schema["properties"].items()
        if _reference(entry)
    }


def _reference(entry: Mapping[str, Any]) -> str:
    """What a section's entry points to; pydantic before 2.9 wraps it."""
    pointer = entry.get("allOf", [entry])[0].get("$ref", "")
    return str(pointer)


def _info(key: str, section: str, entry: Mapping[str, Any], required: bool) -> SettingInfo:
    kinds = [part.get("type") for part in _alternatives(entry)]
    return SettingInfo(
        key=key,
        section=section,
        kind=_kind(entry),
        allowed=_allowed(entry),
        description=entry.get("description", ""),
        is_text="string" in kinds and not {"array", "integer", "number"} & set(kinds),
        is_flag="boolean" in kinds,
        is_open="object" in kinds,
        nullable="null" in kinds,
        required=required,
    )


def _alternatives(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(entry.get("anyOf", [entry]))


def _kind(entry: Mapping[str, Any]) -> str:
    words = {"integer": "INT", "number": "NUM", "boolean": "BOOL", "object": "MAP", "array": "LIST"}
    parts = []
    for part in _alternatives(entry):
        if "enum" in part or "const" in part:
            parts.append("|".join(part.get("enum", [part.get("const")])))
        elif "prefixItems" in part:
            parts.append("[A,B]")
        elif part.get("type") == "string":
            parts.append("PATH" if part.get("format") == "path" else "TEXT")
        elif part.get("type") != "null":
            parts.append(words[part["type"]])
    return "|".join(parts)


def _allowed(entry: Mapping[str, Any]) -> str:
    alternatives = _alternatives(entry)
    parts = [_one_allowed(part) for part in alternatives if part.get("type") != "null"]
    text = entry.get("allowed") or " or ".join(parts)
    if any(part.get("type") == "null" for part in alternatives):
        text += " or null"
    examples = entry.get("examples", ())
    return text + (f" (e.g. {' or '.join(format_value(e) for e in examples)})" if examples else "")


def _one_allowed(part: Mapping[str, Any]) -> str:
    if "enum" in part or "const" in part:
        return join_or([str(name) for name in part.get("enum", [part.get("const")])])
    kind = part.get("type")
    if kind == "array" and "prefixItems" in part:
        return f"two numbers [a, b], each {_bounds(part['prefixItems'][0]) or 'of any size'}"
    if kind == "array":
        return "a list of them"
    if kind == "string" and "pattern" in part:
        return "a word of letters, digits, '.', '_' and '-'"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "a path" if part.get("format") == "path" else "text",
        "object": "a mapping",
    }
    return " ".join(filter(None, [words[str(kind)], _bounds(part)]))


def _bounds(part: Mapping[str, Any]) -> str:
    words = (
        ("exclusiveMinimum", "above"),
        ("minimum", "of at least"),
        ("exclusiveMaximum", "below"),
        ("maximum", "at most"),
    )
    return " and ".join(f"{word} {part[name]:g}" for name, word in words if name in part)


def join_or(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def format_value(value: Any) -> str:
    """A value as YAML writes it; text in quotes, long values truncated to 70 characters, on one line."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 75 digits"  # Python refuses to write out one of thousands
    text = f"'{printable(value)}'" if isinstance(value, str) else json.dumps(value, default=str)
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{k}: {format_value(v)}" for k, v in value.items()) + "}"
    return text if len(text) <= 70 else text[:67] + "..."


def printable(text: str) -> str:
    """`text` with escapes in place of line breaks, control characters and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str) -> str:
    """`text` on one line, at most 70 characters."""
    line = printable(text)
    return line if len(line) <= 70 else line[:67] + "..."


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """Known settings that are most like `key`, at most two, the best first."""
    wanted_key = key.replace("-", "_")
    last = wanted_key.rsplit(".", 1)[-1]
    same_end = [k for k in known if k.rsplit(".", 1)[-1] == last]
    if same_end:
        return (
            same_end[:2] if "." not in wanted_key else difflib.get_close_matches(wanted_key, same_end, 1, 0.0)
        )
    dotted = [k for k in known if k.replace(".", "_") == wanted_key.replace(".", "_")]
    if dotted:
        return dotted
    begun = [k for k in known if f"{k.rsplit('.', 1)[-1]}_".startswith(f"{last}_")]
    if begun:  # a first word alone: gpus, batch, warmup
        return begun[:2] if "." not in wanted_key else difflib.get_close_matches(wanted_key, begun, 1, 0.0)
    close = difflib.get_close_matches(wanted_key, known, 1, 0.7)
    if close:
        return close
    ends = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    return [ends[e] for e in difflib.get_close_matches(last, ends, 1, 0.75)]


def unknown(key: str, known: Sequence[str]) -> str:
    """The message for a setting that does not exist."""
    key = shortened(key)
    close = nearest(key, known)
    hint = f"did you mean {join_or([repr(k) for k in close])}?" if close else "--help lists all settings"
    return f"unknown setting '{key}'; {hint}"


def is_section(key: str, inner: Sequence[str]) -> str:
    """The message for a section that is given a value in place of the settings in it."""
    return f"'{key}' is a section of settings, not one: {', '.join(inner)}"


def explain(
    errors: Sequence[Mapping[str, Any]],
    given: Mapping[str, Any],
    infos: Mapping[str, SettingInfo],
    typed: Mapping[str, str] | None = None,
) -> list[tuple[str, str]]:
    """Pydantic's errors in words: (dotted key, one sentence) each, every key once, in pydantic's order.

    Args:
        errors: `ValidationError.errors()`; read are `type`, `loc` and, for contradictions, `ctx`.
        given: the nested values that were validated.
        infos: all settings, by dotted key.
        typed: dotted key -> text of values from the command line, which are shown as they were typed.
    """
    typed = typed or {}
    sentences: dict[str, str] = {}
    sections: dict[str, list[str]] = {}
    for info in infos.values():
        if info.section:
            sections.setdefault(info.section, []).append(info.key)
    for error in errors:
        loc = [str(part) for part in error["loc"]]
        key = next((".".join(loc[:n]) for n in (2, 1) if ".".join(loc[:n]) in infos), ".".join(loc))
        if error["type"] == "extra_forbidden":
            sentences.setdefault(key, _misplaced(key, infos, _look_up(given, loc)))
        elif error["type"] == "missing" and key in sections:
            for inner in sections[key]:
                if infos[inner].required:
                    sentences.setdefault(inner, _missing(infos[inner]))
        elif error["type"] == "missing" and len(loc) <= 2:
            sentences.setdefault(key, _missing(infos[key]))
        elif key in sections:
            sentences.setdefault(key, is_section(key, sections[key]))
        elif key in infos and error["type"] != "value_error":
            if infos[key].is_open and len(loc) > 2:
                key = ".".join(loc[:3])
            sentences.setdefault(
                key, _wrong(key, infos, _look_up(given, loc[: 1 + key.count(".")]), typed.get(key))
            )
        else:  # a validator wrote the sentence; one of several settings wrote several, one a line
            sentences.setdefault(key, str(error.get("ctx", {}).get("error", error.get("msg"))))
    return list(sentences.items())


def _wrong(key: str, infos: Mapping[str, SettingInfo], value: Any, typed: str | None) -> str:
    info = infos.get(key)
    allowed = info.allowed if info else "a number, text, true, false, null or a list of them"
    if typed is not None and not isinstance(value, str | None):
        return f"{key} must be {allowed}, not {shortened(typed)}"
    message = f"{key} must be {allowed}, not {format_value(value if typed is None else typed)}"
    if info and info.is_text and isinstance(value, int | float):
        message += f" (text that looks like this goes in quotes, '{format_value(value)}')"
    return message


def _missing(info: SettingInfo) -> str:
    return f"missing setting '{info.key}' ({info.allowed}): {info.description}"


def _misplaced(key: str, infos: Mapping[str, SettingInfo], value: Any) -> str:
    if key in infos and "." in key:
        section, name = key.split(".", 1)
        return f"'{key}' in a file is written nested, '{section}: {{{name}: {format_value(value)}}}'"
    if isinstance(value, Mapping):  # a section whose name is wrong
        return unknown(key, list(dict.fromkeys(info.section or info.key for info in infos.values())))
    return unknown(key, list(infos))


def _look_up(values: Any, path: Sequence[str]) -> Any:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values
