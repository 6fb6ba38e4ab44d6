"""Numbers, durations, paths and errors as text, for tables, messages and figures. A leaf."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

NOT_MEASURED = "-"
"""Cell of a table without a value."""

WIDTH = 98
"""Columns of a line of prose on a terminal."""

_LIST, _NO_BREAK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]"), "\0"


def duration(seconds: float) -> str:
    """`45 s`, `1 min 12 s`, `2 min`, `3 h 05 min`, `2 d 04 h`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        (large, unit), (small, small_unit) = (s // 60, "min"), (s % 60, "s")
    elif s < 86400:
        (large, unit), (small, small_unit) = (s // 3600, "h"), (s % 3600 // 60, "min")
    else:
        (large, unit), (small, small_unit) = (s // 86400, "d"), (s % 86400 // 3600, "h")
    return f"{large} {unit} {small:02d} {small_unit}" if small else f"{large} {unit}"


def short_path(path: Path) -> str:
    """The path relative to the working directory if it lies below it, else as it is."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)


def wrapped(text: str) -> list[str]:
    """Lines of at most `WIDTH` columns, the later ones indented; a list in brackets stays on one line."""
    unbroken = _LIST.sub(lambda match: match[0].replace(" ", _NO_BREAK), text)
    lines = textwrap.wrap(
        unbroken, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]


def first_line(error: BaseException) -> str:
    """The first line of an error's message; "" if it has none."""
    return next(iter(str(error).strip().splitlines()), "").strip()


def printable(text: str) -> str:
    r"""The text as valid Unicode. Bytes of a file name that are not UTF-8, which Python holds as lone surrogates: `\xff`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogateescape" if _only_bytes(text) else "surrogatepass")
        return raw.decode("utf-8", "backslashreplace")
    return text


REDACTED = "***"
"""Stands for a password or a token."""

_HTTP_USER = re.compile(r"(https?://)[^\s/?#@'\"<>]+@", re.IGNORECASE)
# Text up to the last @: databases take a password with an unescaped @ or slash. A port and a path are no password.
_PASSWORD = re.compile(r"(://[^\s:/?#@'\"<>]*:)(?!\d{1,5}(?:[/?#\s'\"]|$))(?:[^\s?'\"<>]*@|[^\s'\"<>]*@)")
_SECRET_PARAMETER = re.compile(
    r"([?&;#][^\s=&?#'\"<>]*(?:pass|pwd|token|secret|key|sig|cred|auth|sas|connect)[^\s=&?#'\"<>]*=)[^\s&#'\"<>]*",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text without the passwords and tokens of the URIs in it: in `user:password@`, and in query strings.

    What leaves the process passes through here: lines, files of a run, MLflow, errors. Of HTTP addresses the user goes too,
    since git hosts take a token in its place.
    """
    if "://" not in text and "?" not in text:
        return text
    text = _HTTP_USER.sub(rf"\g<1>{REDACTED}@", text)
    text = _PASSWORD.sub(rf"\g<1>{REDACTED}@", text)
    return _SECRET_PARAMETER.sub(rf"\g<1>{REDACTED}", text)


def is_redacted(text: str) -> bool:
    """Whether `redact` took something out of the text."""
    return f"{REDACTED}@" in text or bool(re.search(rf"[?&;#][^\s=]+={re.escape(REDACTED)}", text))


def _only_bytes(text: str) -> bool:
    """Whether all lone surrogates stand for bytes."""
    return all("\udc80" <= character <= "\udcff" for character in text if "\ud800" <= character <= "\udfff")


def params_text(params: float) -> str:
    """`0.230 M`, `5.50 M`, `85.8 M`, `304 M`; below 0.1 M `12.3 k`."""
    return f"{three_digits(params / 1e6)} M" if params >= 1e5 else f"{three_digits(params / 1e3)} k"


def short_number(value: float) -> str:
    """A whole number from 10 on, three significant digits below: `0.0413`, `3.20`, `12`, `1240`."""
    return three_digits(value) if value < 9.995 else f"{value:.0f}"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: `0.00123`, `0.810`, `12.3`, `1230`."""
    if value == 0:
        return "0"
    decimals = 0
    while abs(value) * 10**decimals < 99.95 and decimals < 6:
        decimals += 1
    return f"{value:.{decimals}f}"
