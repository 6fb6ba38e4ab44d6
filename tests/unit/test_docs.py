"""README and docs: links lead somewhere, settings and files exist, code runs, and README stays short."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from bim.orchestrator.config.schema import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
BRITISH = re.compile(
    r"(?i)(?<![a-z])("  # a part of a name counts as a word: `mask_colour`
    r"(?:behavi|col|endeav|fav|flav|harb|hon|hum|lab|neighb|rig|rum|sav|splend|vap|vig)our[a-z]*"
    r"|(?:centi|kilo|milli)?(?:cent|fib|lit|met|theat)re[ds]?|centring"
    r"|(?:re|un)?(?:channel|fuel|label|level|marvel|model|signal|total|travel|tunnel)l(?:ed|er|ers|ing)"
    r"|(?:def|lic|off|pret)ence[ds]?|practis(?:e|ed|es|ing)|analys(?:e|ed|er|ing)|paralys(?:e|ed|es|ing)"
    r"|(?:after|back|down|in|on|out|to|up)wards|whilst|amongst|learnt|spelt|burnt|dreamt"
    r"|ageing|aluminium|analogues?|artefacts?|catalogues?|fulfils?|greys?|judgements?|moulds?|programmes?"
    r"|sceptic[a-z]*|skilful[a-z]*|sulph[a-z]*|tyres?|wilful[a-z]*"
    r"|[a-z]*(?:author|categor|character|custom|emphas|discret|final|general|initial|item|local|maxim|memor|minim"
    r"|modern|normal|optim|organ|parallel|penal|prior|quant|random|real|recogn|regular|serial|special|stabil"
    r"|standard|summar|synchron|token|util|vector|visual)is(?:e|ed|er|ers|es|ing|ation|ations)"
    r")(?![a-z])"
)


def ids(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_readme_is_at_most_150_lines_of_at_most_100_columns() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


def test_readme_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert (
        "python -m venv .venv && . .venv/bin/activate && pip install -e . && python pipelines/bim_pipeline.py"
        in lines
    )
    assert "pip install -e '.[dev]' && pytest" in lines


@pytest.mark.parametrize("page", TEXTS, ids=ids(TEXTS))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", without_code(page.read_text(encoding="utf-8")), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", TEXTS, ids=ids(TEXTS))
def test_named_files_of_the_repository_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:models|orchestrator|pipelines|tests|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", TEXTS, ids=ids(TEXTS))
def test_named_settings_exist(page: Path) -> None:
    schema = Settings.model_json_schema()
    for name in re.findall(r"--([a-z_]+(?:\.[a-z_]+)+)", page.read_text(encoding="utf-8")):
        group, key, *_ = name.split(".")
        definition = schema["properties"][group]["$ref"].rsplit("/", 1)[1]
        assert key in schema["$defs"][definition]["properties"], f"{page.name} names --{name}"


@pytest.mark.parametrize("page", TEXTS, ids=ids(TEXTS))
def test_spelling_is_american(page: Path) -> None:
    assert BRITISH.findall(without_code(page.read_text(encoding="utf-8"))) == []


def test_spelling_of_code_is_american() -> None:
    files = [
        file
        for folder in ("models", "orchestrator", "pipelines", "tests")
        for pattern in ("*.py", "*.yaml")
        for file in sorted((ROOT / folder).rglob(pattern))
        if file.name != Path(__file__).name
    ]
    british = {
        f"{file.relative_to(ROOT)}: {word}"
        for file in files
        for word in BRITISH.findall(file.read_text("utf-8"))
    }
    spelling = {entry for entry in british if not re.fullmatch(r"tests/.*: (colour|grey)", entry)}
    assert spelling <= {"models/backbones/mask_fill.py: colour"}, (
        "`colour` is a key of checkpoints, and stays"
    )


@pytest.mark.parametrize(
    "word",
    ["favour", "honours", "mask_colour", "centred", "Behaviour", "optimiser", "tokenised", "afterwards"],
)
def test_british_spelling_is_told_from_american(word: str) -> None:
    assert BRITISH.findall(word)
    american = (
        "four hours of our contour; center, metric, labeled, analyses, wise, promise, raised, precise, level"
    )
    assert BRITISH.findall(american) == []


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def listed(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [name for child in children for name in listed(child)]  # type: ignore[attr-defined]

    assert sorted(listed(config["nav"])) == [page.name for page in PAGES]


@pytest.mark.parametrize(
    "name", ["architecture.md", pytest.param("python-api.md", marks=pytest.mark.slow, id="python-api.md")]
)
def test_code_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that begins with the name of a file, `# my_parts.py`, is that file in the working directory."""
    from bim.models.decoders import DECODERS
    from bim.models.targets import TARGETS
    from bim.orchestrator.data.source import SOURCES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("bim.orchestrator.plugins._imported", {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    tables: list[dict[str, Any]] = [TARGETS, DECODERS, SOURCES]
    registered = [dict(table) for table in tables]
    page = (ROOT / "docs" / name).read_text(encoding="utf-8").partition("## Run the command")[0]
    code = []
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        file = re.match(r"# (\w+\.py)\n", block)
        if file is None:
            code.append(block)
        else:
            (tmp_path / file[1]).write_text(block, encoding="utf-8")
    try:
        exec(compile("\n".join(code), name, "exec"), {"__name__": name})
    finally:
        for table, entries in zip(tables, registered, strict=True):
            table.clear()
            table.update(entries)
