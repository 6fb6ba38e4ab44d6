from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.config.auto_rules import CHOSEN_SETTINGS, auto_rules
from bim.orchestrator.config.cli import load_settings, recipe_file
from bim.orchestrator.config.help_page import COMMON, help_text
from bim.orchestrator.config.recipes import DEFAULT_RECIPE, bundled_recipes, read_recipe
from bim.orchestrator.config.schema import SettingsError, all_settings
from bim.orchestrator.config.transforms import settings_to_yaml
from bim.orchestrator.data.phases import PhaseSpec
from bim.orchestrator.training.lr_schedule import peak_rate

RECIPES = "digits_backbones, digits_demo, sign_digits, sign_digits_hierarchies, vit_base_imagenet"


def choose_nothing(given: Mapping[str, Any], budget_s: float | None) -> dict[str, Any]:
    """Settings as they are chosen for images."""
    return read_recipe(DEFAULT_RECIPE)


def problem(*argv: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(argv)
    return str(caught.value)


def test_no_argument_gives_the_default_recipe() -> None:
    assert load_settings([]).name == DEFAULT_RECIPE


@pytest.mark.parametrize("recipe", sorted(bundled_recipes()))
def test_every_bundled_recipe_loads_by_its_name(recipe: str) -> None:
    assert load_settings(["--recipe", recipe]).name == recipe


def test_the_imagenet_recipe_has_mae_s_batch_and_learning_rate() -> None:
    settings = load_settings(["--recipe=vit_base_imagenet"])
    phase = PhaseSpec(0, (224, 224), settings.data.batch_size, settings.data.accumulate)
    assert phase.images_per_step == 4096
    assert peak_rate(settings.optim.blr, phase) == pytest.approx(2.4e-3)


def test_overrides_are_read_as_yaml_with_or_without_an_equals_sign() -> None:
    settings = load_settings(
        ["--mask.ratio", "0.6", "--blocks=2", "--optim.blr", "1e-4", "--optim.clip_grad", "null", "--seed=7"]
    )
    assert settings.mask.ratio == 0.6
    assert settings.blocks == 2
    assert settings.optim.blr == 1e-4
    assert settings.optim.clip_grad is None
    assert settings.seed == 7


@pytest.mark.parametrize("argv", [["--blocks", "[3,3,3,3]"], ["--blocks", "[3,", "3,", "3,", "3]"]])
def test_a_list_may_be_quoted_or_taken_apart_by_the_shell(argv: list[str]) -> None:
    assert load_settings([*argv, "--seed", "1"]).blocks == (3, 3, 3, 3)


def test_text_is_taken_as_it_stands() -> None:
    settings = load_settings(
        ["--data.source", "2024", "--data.label_column=no", "--tracking.uri", "http://h:5000"]
    )
    assert settings.data.source == "2024"
    assert settings.data.label_column == "no"
    assert settings.tracking.uri == "http://h:5000"
    assert load_settings(["--tracking.uri", "null"]).tracking.uri is None


def test_of_a_setting_given_twice_the_last_one_holds() -> None:
    assert load_settings(["--seed", "1", "--seed", "2"]).seed == 2


@pytest.mark.parametrize("argv", [["--resume"], ["--resume", "true"], ["--resume=true"]])
def test_resume_is_a_flag(argv: list[str]) -> None:
    assert load_settings([*argv, "--out", "runs/a"]).resume is True
    assert load_settings(["--resume", "false"]).resume is False


def test_one_argument_of_the_backbone_can_be_set_beside_the_recipe_s() -> None:
    args = load_settings(["--backbone.model_args.depth", "4"]).backbone.model_args
    assert args["depth"] == 4
    assert args["img_size"] == 32
    assert load_settings(["--backbone.model_args", "{depth: 4}"]).backbone.model_args == {"depth": 4}


def test_another_backbone_does_not_inherit_the_arguments_of_the_recipe_s() -> None:
    name = ["--backbone.name", "vit_small_patch16_224"]
    assert load_settings(name).backbone.model_args == {}
    assert load_settings(["--backbone.model_args.depth", "4", *name]).backbone.model_args == {"depth": 4}
    same = load_settings(["--backbone.name", "vit_tiny_patch16_224"])
    assert same.backbone == load_settings([]).backbone


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mask.rato", "0.6"], "unknown setting 'mask.rato'; did you mean 'mask.ratio'?"),
        (["--ratio", "0.6"], "unknown setting 'ratio'; did you mean 'mask.ratio'?"),
        (["--mask-ratio", "0.6"], "unknown setting 'mask-ratio'; did you mean 'mask.ratio'?"),
        (["--epochs", "3"], "unknown setting 'epochs'; did you mean 'schedule.epochs'?"),
        (
            ["--batch_size", "3"],
            "unknown setting 'batch_size'; did you mean 'data.batch_size' or 'evaluation.batch_size'?",
        ),
        (
            ["--gpus", "1"],
            "unknown setting 'gpus'; did you mean 'placement.gpus_per_stage'?",
        ),
        (["--data.batch", "3"], "unknown setting 'data.batch'; did you mean 'data.batch_size'?"),
        (["--rec", "x"], "unknown setting 'rec'; --help lists all settings"),
        (
            ["--mask", "0.6"],
            "'mask' is a section of settings, not one: mask.ratio, mask.encode, mask.per_batch, mask.sweep_groups, "
            "mask.loss_on_newly_masked",
        ),
        (["--schedule.epochs", "1e2"], "schedule.epochs must be a whole number of at least 1, not 1e2"),
        (["--seed", "-1"], "seed must be a whole number of at least 0, not -1"),
        (["--seed", "yes"], "seed must be a whole number of at least 0, not 'yes'"),
        (["--seed", "[1,"], "seed must be a whole number of at least 0, not '[1,'"),
        (["--seed"], "--seed needs a value: a whole number of at least 0"),
        (["--out", "--seed", "1"], "--out needs a value: a path or null"),
        (["--out="], "--out needs a value: a path or null"),
        (
            ["--backbones", ""],
            "--backbones needs a value: timm names joined by commas, or a list of names and mappings or null "
            "(e.g. 'vit_small_patch16_224,swin_tiny_patch4_window7_224')",
        ),
        (
            ["--backbones", "vit_small_patch16_224,twins_svt_small", "--backbone.model_args.img_size", "128"],
            "--backbone.model_args.img_size: with --backbones each backbone has its own model_args: "
            "--backbones '[{name: TIMM_NAME, model_args: {img_size: 128}}, ...]'",
        ),
        *(
            (
                ["--recipe", "digits_backbones", f"--{key}", "64"],
                f"--{key}: digits_backbones trains several backbones (vit_tiny_patch16_224, swin_tiny_patch4_window7_224); "
                "add --backbones null to train a single one, or name them all with --backbones",
            )
            for key in ("backbone.name", "backbone.model_args.img_size")
        ),
        (["--resume", "maybe"], "resume must be true or false, not 'maybe'"),
        (["--baseline", "hog"], "baseline must be none or mae, not 'hog'"),
        (
            ["seed", "3"],
            "unexpected arguments 'seed', '3': settings are written --key value, and a value with spaces needs quotes",
        ),
        (
            ["--recipe"],
            f"--recipe needs a name or a file: {RECIPES}, or a YAML file",
        ),
        (
            ["--recipe", "digit_demo"],
            f"no recipe and no file is called 'digit_demo'; did you mean 'digits_demo'? (recipes: {RECIPES})",
        ),
        (
            ["--backbone.model_args.depth", "{a: 1}"],
            "backbone.model_args.depth must be a number, text, true, false, null or a list of them, not {a: 1}",
        ),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(argv: list[str], message: str) -> None:
    assert problem(*argv) == message


def test_a_recipe_of_several_backbones_trains_a_single_one_when_it_is_told_so() -> None:
    settings = load_settings(
        ["--recipe", "digits_backbones", "--backbones", "null", "--backbone.name", "vit_small_patch16_224"]
    )
    assert settings.backbones is None
    assert settings.backbone.name == "vit_small_patch16_224"


def test_an_argument_of_a_backbone_may_be_a_list_of_lists() -> None:
    sizes = load_settings(["--backbone.model_args.window_size", "[[4,4],[8,8]]"]).backbone.model_args[
        "window_size"
    ]
    assert sizes == [[4, 4], [8, 8]]


def test_several_wrong_arguments_are_all_named() -> None:
    assert problem("--mask.rato", "1", "--seed", "x", "--blocks").splitlines() == [
        "unknown setting 'mask.rato'; did you mean 'mask.ratio'?",
        "--blocks needs a value: a whole number of at least 1 or a list of them (e.g. 4 or [3, 3, 3, 3])",
        "seed must be a whole number of at least 0, not 'x'",
    ]


def test_an_own_recipe_file_is_named_in_its_errors_and_overrides_are_not(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nbackbone: {name: vit_tiny_patch16_224}\nmask: {rato: 0.6}\nblocks: 0\n"
        "data: {source: digits, batch_size: 8}\nschedule: {epochs: 1}\nmask.ratio: 0.5\n"
    )
    lines = problem("--recipe", str(file), "--seed", "x").splitlines()
    assert f"{file}: unknown setting 'mask.rato'; did you mean 'mask.ratio'?" in lines
    assert f"{file}: 'mask.ratio' in a file is written nested, 'mask: {{ratio: 0.5}}'" in lines
    assert "seed must be a whole number of at least 0, not 'x'" in lines
    assert any(line.startswith(f"{file}: blocks must be a whole number") for line in lines)
    assert len(lines) == 4


def test_an_override_repairs_what_the_file_got_wrong(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(settings_to_yaml(load_settings([])).replace("blocks: 4", "blocks: 0"))
    assert problem("--recipe", str(file)).startswith(f"{file}: blocks must be")
    assert load_settings(["--recipe", str(file), "--blocks", "2"]).blocks == 2


def test_saved_settings_are_a_recipe_that_gives_equal_settings(tmp_path: Path) -> None:
    made = load_settings(
        ["--blocks", "[2,2,2,2]", "--mask.ratio", "[0.6,0.7,0.7,0.8]", "--optim.blr", "1e-5"]
    )
    saved = tmp_path / "settings.yaml"
    saved.write_text(settings_to_yaml(made))
    assert load_settings(["--recipe", str(saved)]) == made


def test_the_recipe_of_a_run_that_is_resumed_is_the_file_that_it_saved(tmp_path: Path) -> None:
    saved = tmp_path / "settings.yaml"
    argv = ["--out", str(tmp_path), "--resume", "--dry-run"]
    assert recipe_file(argv) is None
    saved.write_text(settings_to_yaml(load_settings([])))
    assert recipe_file(argv) == saved
    assert recipe_file(["--out", str(tmp_path)]) is None
    assert recipe_file([*argv, "--recipe", "digits_demo"]) is None
    assert recipe_file([*argv, "--recipe", "mine.yaml"]) == Path("mine.yaml")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--seed", "x", "--help"]])
def test_help_prints_and_leaves_with_status_0(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        load_settings(argv)
    assert left.value.code == 0
    assert capsys.readouterr().out == help_text() + "\n"


def test_help_into_a_closed_pipe_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [
        sys.executable,
        "-c",
        "from bim.orchestrator.config.cli import load_settings; load_settings(['--help'])",
    ]
    try:
        status = subprocess.run(command, stdout=writer, check=False).returncode
    finally:
        os.close(writer)
    assert status == 0
    assert capfd.readouterr().err == ""


def test_version_prints_and_leaves_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        load_settings(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("bim-orchestrator")


def options_of(text: str) -> list[str]:
    return [line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")]


@pytest.mark.parametrize("width", [80, 100])
def test_help_shows_the_common_settings_and_help_all_every_one_in_the_columns_there_are(width: int) -> None:
    common = [key for keys in COMMON.values() for key in keys]
    assert len(common) == len(set(common)) == 25
    for own_images in (None, "photos"):
        for every_setting, keys in ((False, common), (True, list(all_settings()))):
            text = help_text(every_setting=every_setting, own_images=own_images, width=width)
            assert max(len(line) for line in text.splitlines()) <= width
            assert [option for option in options_of(text) if option in all_settings()] == keys
            for recipe in bundled_recipes():
                assert any(line.strip().startswith(recipe) for line in text.splitlines())


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("200", 100), ("20", 60)])
def test_help_fits_the_terminal(
    columns: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        load_settings(["--help"])
    assert capsys.readouterr().out == help_text(width=width) + "\n"


def test_help_tells_a_newcomer_how_settings_are_chosen_for_images() -> None:
    budget = auto_rules().time_budget
    text = " ".join(help_text().split())
    assert "with --data.source and without --recipe, settings are chosen from the images" in text
    assert (
        f"--time_budget bounds the training ({budget['gpu']} with a GPU and {budget['cpu']} without" in text
    )
    assert "python pipelines/bim_pipeline.py --data.source DIR --dry-run" in text


def test_help_beside_own_images_shows_no_value_of_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(["--data.source", "photos", "--help-all"], automatic=choose_nothing)
    text = capsys.readouterr().out.split("\nExamples\n")[0]
    entries = [entry.split() for entry in text.split("\n  --")]
    values = {words[0]: " ".join(words).rpartition("[")[2].partition("]")[0] for words in entries}
    values = {
        key: values[key] for key in ("data.source", "schedule.epochs", "optim.blr", "mask.ratio", "seed")
    }
    assert values == {
        "data.source": "photos",
        "schedule.epochs": "chosen",
        "optim.blr": "chosen",
        "mask.ratio": "0.6, 0.75",
        "seed": "0",
    }
    assert text.count("[chosen]") == 1 + len(CHOSEN_SETTINGS)
    with pytest.raises(SystemExit):
        load_settings(["--data.source", "p", "--recipe", "sign_digits", "--help"], automatic=choose_nothing)
    assert "its value in sign_digits in brackets" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_shows_the_values_of_the_recipe_that_is_named(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_settings(["--recipe", "vit_base_imagenet", flag])
    shown = capsys.readouterr().out
    assert "[vit_base_patch16_224]" in shown
    assert "Settings, each with its value in vit_base_imagenet in brackets" in shown


def test_help_of_a_recipe_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SettingsError, match="no recipe and no file is called 'nope'"):
        load_settings(["--recipe", "nope", "--help"])


def test_print_config_prints_a_recipe_that_gives_equal_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        load_settings(["--seed", "3", "--print-config"])
    assert left.value.code == 0
    saved = tmp_path / "printed.yaml"
    saved.write_text(capsys.readouterr().out)
    assert load_settings(["--recipe", str(saved)]) == load_settings(["--seed", "3"])


def test_print_config_of_wrong_settings_is_an_error() -> None:
    with pytest.raises(SettingsError, match="seed must be"):
        load_settings(["--seed", "x", "--print-config"])


def test_flags_that_are_no_settings_may_stand_anywhere() -> None:
    assert load_settings(["--verbose", "--seed", "3", "--quiet"]) == load_settings(["--seed", "3"])


@pytest.mark.parametrize("options", [["--help"], ["--mask.ration", "0.5"]])
def test_what_needs_neither_torch_nor_data_is_answered_within_a_second(options: list[str]) -> None:
    code = f"import sys; from bim.orchestrator.config.cli import load_settings; load_settings({options!r})"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_s < 1, f"the answer took {cpu_s:.1f} s of CPU time"


def test_the_examples_of_the_help_are_accepted() -> None:
    import shlex

    text = help_text(width=80).replace("\\\n", "")
    commands = [line for line in text.splitlines() if line.startswith("  python pipelines/")]
    assert len(commands) >= 4
    for command in commands:
        argv = [token for token in shlex.split(command)[2:] if token != "--dry-run"]
        assert shlex.split(command)[:2] == ["python", "pipelines/bim_pipeline.py"]
        load_settings(argv, automatic=choose_nothing)


def test_options_of_a_search_without_a_search_are_told(caplog: pytest.LogCaptureFixture) -> None:
    load_settings(["--search.trials", "0", "--search.trial_epochs", "3"])
    assert caplog.messages == ["note: --search.trial_epochs has no effect: search.trials is 0"]
    caplog.clear()
    load_settings(["--search.trials", "2", "--search.trial_epochs", "9"])
    load_settings(["--search.trials", "0"])
    assert caplog.messages == []
