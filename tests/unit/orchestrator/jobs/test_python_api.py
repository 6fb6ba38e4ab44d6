"""The job as a function: its settings, its errors, its result, and what signals do."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bim.orchestrator
from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import settings_to_mapping
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.jobs.job import JobResult
from bim.orchestrator.jobs.prepare import PreparedJob
from bim.orchestrator.jobs.python_api import Pretrained, pretrain, settings_options
from bim.orchestrator.runs.output_dir import OutputError
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError
from tests.own_parts import Stripes

TINY: dict[str, Any] = {
    "recipe": "digits_demo",
    "blocks": 2,
    "backbone": {
        "model_args": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    },
    "decoder": {"dim": 32, "num_heads": 1},
    "data": {"workers": 0, "batch_size": 32},
    "schedule": {"epochs": 2, "warmup_epochs": 0},
    "placement": {"backend": "in_process", "threads_per_stage": 1},
    "search": {"trials": 0},
    "evaluation": {"latency": False},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def options(**sections: Any) -> list[str]:
    return settings_options(None, None, None, {}, sections)


def settings(**sections: Any) -> Settings:
    return load_settings(options(**sections))


def test_the_package_is_light_and_imports_the_function_when_it_is_asked_for() -> None:
    code = """
import sys, bim.orchestrator, bim.orchestrator.jobs
heavy = {"torch", "timm", "ray", "mlflow", "pydantic", "numpy"}
assert not heavy & {name.partition(".")[0] for name in sys.modules}, sorted(sys.modules)
from bim.orchestrator import pretrain
assert bim.orchestrator.pretrain is pretrain
assert not {"torch", "ray", "mlflow"} & {name.partition(".")[0] for name in sys.modules}
try:
    bim.orchestrator.pretrian
except AttributeError as error:
    assert "pretrian" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_are_keywords_mappings_and_dotted_keys() -> None:
    by_keyword = settings(
        seed=3, name="mine", mask={"ratio": (0.5, 0.75)}, schedule={"epochs": 20}, target={"name": "hog"}
    )
    dotted = {
        "seed": 3,
        "name": "mine",
        "mask.ratio": [0.5, 0.75],
        "schedule": {"epochs": 20},
        "target.name": "hog",
    }
    by_key = load_settings(settings_options(None, None, None, dotted, {}))
    argv = [
        "--seed",
        "3",
        "--name",
        "mine",
        "--mask.ratio",
        "[0.5,0.75]",
        "--schedule.epochs",
        "20",
        "--target.name",
        "hog",
    ]
    assert by_keyword == by_key == load_settings(argv)


def test_every_setting_of_every_recipe_survives_the_way_through_keywords() -> None:
    for recipe in ("digits_demo", "vit_base_imagenet", "digits_backbones"):
        plain = load_settings(["--recipe", recipe])
        values = settings_to_mapping(plain)
        values = {key: value for key, value in values.items() if not (key == "backbone" and plain.backbones)}
        assert load_settings(settings_options(None, None, recipe, {}, values)) == plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), 0.5),
        (torch.tensor([0.5, 0.75]), (0.5, 0.75)),
        (np.array([0.5, 0.75]), (0.5, 0.75)),
    ],
)
def test_numbers_of_numpy_and_torch_are_numbers(value: Any, expected: object) -> None:
    assert settings(mask={"ratio": value}).mask.ratio == expected


def test_text_with_any_characters_is_itself(tmp_path: Path) -> None:
    for text in ("--verbose", "[a", "a: b", "'q\" {x}", "1", "true", "a b = c"):
        assert settings(tracking={"experiment": text}).tracking.experiment == text
    assert settings(out=tmp_path / "a b").out == tmp_path / "a b"
    assert settings(init_from=None).init_from is None
    arguments = {"img_size": 32, "patch_size": 8, "mlp_ratio": 2.0, "act_layer": "gelu: x"}
    assert settings(backbone={"model_args": arguments}).backbone.model_args == arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sead": 1}, "unknown setting 'sead'; did you mean 'seed'"),
        ({"data": {"batchsize": 1}}, "unknown setting 'data.batchsize'; did you mean 'data.batch_size'"),
        ({"backbone": "vit_tiny_patch16_224"}, "'backbone' is a section of settings, not one: backbone.name"),
        ({"seed": "4"}, "seed must be a whole number"),
        ({"name": 4}, "name must be a word"),
        ({"mask": {"ratio": object()}}, "mask.ratio must be a number .* not a object"),
        ({"mask": {"ratio": 2}}, "mask.ratio must be"),
        ({"optim": {"blr": float("nan")}}, "optim.blr must be a number"),
        ({"help": True}, "unknown setting 'help'"),
        ({"print_config": None}, "unknown setting 'print_config'"),
        ({"schedule": {"epochs": 10**30}}, "schedule.epochs must be"),
        ({"decoder": {"dim": [32, 32]}}, "decoder.dim lists 2 values for 4 blocks"),
    ],
)
def test_wrong_settings_are_the_errors_of_the_command(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        pretrain("digits", **given)


def test_what_is_given_twice_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^data\.source is given twice\nseed is given twice$"):
        pretrain("digits", data={"source": "digits"}, settings={"seed": 1}, seed=2)


def test_other_wrong_input_raises_and_does_not_exit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        pretrain(tmp_path / "nowhere", out=tmp_path / "run", **TINY)
    with pytest.raises(DataError, match="an object of class int is no data set"):
        pretrain(5, out=tmp_path / "run", **TINY)
    with pytest.raises(SettingsError, match="there is no module"):
        pretrain("digits", out=tmp_path / "run", plugins="no_such_plugin", **TINY)
    with pytest.raises(OutputError, match="no run to resume"):
        pretrain("digits", out=tmp_path / "run", resume=True, **TINY)
    with pytest.raises(SettingsError, match="no recipe and no file is called 'digits_dem'"):
        pretrain(recipe="digits_dem")
    assert not (tmp_path / "run").exists()


def test_a_run_returns_paths_scores_and_models(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything that a plugin can register."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stripes:120").mkdir()  # a name that is registered is no path
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    own = TINY | {
        "backbone": {"name": "vit_own"},
        "decoder": TINY["decoder"] | {"name": "counted"},
        "target": {"name": "half"},
    }
    result = bim.orchestrator.pretrain(
        "stripes:120", "run", plugins=["tests.own_parts"], tracking={"uri": store}, quiet=True, **own
    )
    assert result.out == tmp_path / "run"
    assert list(result.variants) == [2, 4]
    assert set(result.scores) == {2, 4}
    assert result.scores[4]["rankme"] > 1
    assert {row["weights"] for row in result.rows} == {"trained", "random"}
    assert "RankMe" in result.table
    assert (result.stopped, result.failed, result.backbones) == (None, (), {})
    model = result.open(2)
    assert not model.training
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 32)
    with pytest.raises(ValueError, match="no variant of 3 layers; there are: 2, 4"):
        result.open(3)
    card = (result.variants[2] / "README.md").read_text()
    assert "import tests.own_parts  # registers vit_own with timm" in card
    saved = load_settings(["--recipe", str(result.settings_file)])
    assert saved.plugins == ("tests.own_parts",)
    assert (saved.target.name, saved.decoder.name, saved.data.source) == ("half", "counted", "stripes:120")
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert capsys.readouterr().out == ""


def stopped_by(name: str) -> Callable[..., JobResult]:
    def run_job(job: PreparedJob, stop: StopRequest | None = None) -> JobResult:
        return JobResult(job.out, name)

    return run_job


def test_after_ctrl_c_the_program_gets_its_own_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bim.orchestrator.jobs.job.run_job", stopped_by("SIGINT"))
    with pytest.raises(KeyboardInterrupt):
        pretrain("digits", tmp_path / "run", **TINY)


def test_another_signal_reaches_the_handler_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bim.orchestrator.jobs.job.run_job", stopped_by("SIGUSR2"))
    received: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: received.append(number))
    try:
        result = pretrain("digits", tmp_path / "run", **TINY)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert received == [signal.SIGUSR2]
    assert result == Pretrained(tmp_path / "run", stopped="SIGUSR2")


def test_in_another_thread_nothing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bim.orchestrator.jobs.job.run_job", stopped_by("SIGINT"))
    results: list[Pretrained] = []
    thread = threading.Thread(target=lambda: results.append(pretrain("digits", tmp_path / "run", **TINY)))
    thread.start()
    thread.join()
    assert results[0].stopped == "SIGINT"


class Interrupting(Stripes):
    """Presses Ctrl-C once, when images have been read for about three epochs."""

    reads = 0

    def __getitem__(self, index: int) -> np.ndarray:
        Interrupting.reads += 1
        if Interrupting.reads == 300:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def test_a_data_set_that_is_an_object_is_trained_on_and_after_ctrl_c_resumed(
    tmp_path: Path, store: str
) -> None:
    longer = TINY | {"schedule": {"epochs": 6, "warmup_epochs": 0}, "tracking": {"uri": store}}
    before = signal.getsignal(signal.SIGINT)
    images, out = Interrupting("120"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pretrain(images, out, **longer)
    assert signal.getsignal(signal.SIGINT) == before
    assert load_settings(["--recipe", str(out / "settings.yaml")]).data.source == "dataset:Interrupting"
    (checkpoint,) = (out / "checkpoints").glob("step-*")
    assert 0 < int(checkpoint.name.removeprefix("step-")) < 12
    with pytest.raises(DataError, match="given as an object in Python; give it again"):
        pretrain(out=out, resume=True)
    with pytest.raises(OutputError, match="images"):
        pretrain(Interrupting("119"), out, resume=True)
    result = pretrain(images, out, resume=True)
    assert (result.stopped, list(result.variants)) == (None, [2, 4])


def test_an_error_of_the_training_is_raised_and_the_logging_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: PreparedJob, stop: StopRequest | None = None) -> JobResult:
        logging.getLogger("bim.test").info("a line")
        raise TrainingError("no space left")

    monkeypatch.setattr("bim.orchestrator.jobs.job.run_job", fail)
    logger = logging.getLogger("bim")
    before = (list(logger.handlers), logger.level)
    with pytest.raises(TrainingError, match="no space left"):
        pretrain("digits", tmp_path / "run", **TINY)
    assert (list(logger.handlers), logger.level) == before
