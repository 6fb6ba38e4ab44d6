from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bim.orchestrator.plugins import PluginError, import_plugins, imported_plugins


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("bim.orchestrator.plugins._imported", {})
    return tmp_path


def test_a_module_of_the_working_directory_is_imported_once(folder: Path) -> None:
    (folder / "counted_plugin.py").write_text("import sys\nsys.counted = getattr(sys, 'counted', 0) + 1\n")
    import_plugins(["counted_plugin"])
    import_plugins(["counted_plugin"])
    assert sys.counted == 1  # type: ignore[attr-defined]
    assert imported_plugins() == ("counted_plugin",)


def test_an_installed_module_is_preferred_to_one_of_the_working_directory(folder: Path) -> None:
    (folder / "colorsys.py").write_text("raise RuntimeError('the wrong one')")
    import_plugins(["colorsys"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "import no_such_library\n",
            "'broken_plugin' cannot be imported: ModuleNotFoundError: No module named",
        ),
        ("x = 1\ny = z\n", r"NameError: name 'z' is not defined \(.*broken_plugin.py, line 2\)"),
        ("def f(:\n", r"SyntaxError: .*broken_plugin.py, line 1"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    ],
)
def test_a_module_that_fails_is_one_sentence(folder: Path, content: str, message: str) -> None:
    (folder / "broken_plugin.py").write_text(content)
    with pytest.raises(PluginError, match=message) as caught:
        import_plugins(["broken_plugin"])
    assert len(str(caught.value).splitlines()) == 1
    assert imported_plugins() == ()


@pytest.mark.parametrize("name", ["no_such_plugin", "no_such_package.plugin"])
def test_a_module_that_is_not_there_is_named_with_the_places_where_it_may_lie(
    name: str, folder: Path
) -> None:
    with pytest.raises(PluginError, match=rf"no module '{name.partition('.')[0]}'.*{folder}.*PYTHONPATH"):
        import_plugins([name])
