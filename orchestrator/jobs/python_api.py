"""The main job as a function: settings as keywords, errors as exceptions, results as values.

It reads settings with the command's own reader and runs the command's own job. It never ends the process.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# What takes long to import is imported where it is needed; Ray reads its environment when it is imported.
from bim.orchestrator.config.cli import load_settings, recipe_file
from bim.orchestrator.config.messages import SettingInfo, format_value, unknown
from bim.orchestrator.config.schema import Settings, SettingsError, all_settings, setting_sections
from bim.orchestrator.plugins import import_plugins
from bim.orchestrator.reporting.log import console_unless_configured

if TYPE_CHECKING:
    from torch import nn

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pretrained:
    """What a run left, and how it ended.

    Args:
        out: the output directory.
        variants: layers of every depth variant -> its folder, which timm opens; empty if the run was stopped.
        rows: the table of results, as in `summary.json`: a mapping for every depth, of trained, random and baseline weights.
        table: the same as text.
        stopped: name of the signal that stopped the run early; `resume=True` goes on.
        failed: a sentence for each of several backbones that did not come to its end.
        backbones: of a run with several backbones their results by name; the other fields but `table` are empty then.
        plugins: modules that `open` imports first.
    """

    out: Path
    variants: Mapping[int, Path] = field(default_factory=dict)
    rows: tuple[Row, ...] = field(default=(), repr=False)
    table: str = field(default="", repr=False)
    stopped: str | None = None
    failed: tuple[str, ...] = ()
    backbones: Mapping[str, Pretrained] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    @property
    def settings_file(self) -> Path:
        """The resolved settings, which are a recipe."""
        return self.out / "settings.yaml"

    @property
    def scores(self) -> dict[int, dict[str, float]]:
        """Layers -> what was measured of that variant: `knn_top1`, `linear_top1` or `rankme`, `params`, `gflops`, ..."""
        return {
            int(row["depth"]): {
                key: float(value)
                for key, value in row.items()
                if key not in ("depth", "weights") and isinstance(value, int | float)
            }
            for row in self.rows
            if row.get("weights") == "trained"
        }

    def open(self, depth: int) -> nn.Module:
        """The depth variant of so many layers as timm opens it, in evaluation mode.

        Raises:
            ValueError: there is no such variant.
        """
        if depth not in self.variants:
            listed = ", ".join(map(str, self.variants)) or "none"
            raise ValueError(f"{self.out} has no variant of {depth} layers; there are: {listed}")
        import timm

        import_plugins(self.plugins)
        model: nn.Module = timm.create_model(f"local-dir:{self.variants[depth]}", pretrained=True)
        return model.eval()


def pretrain(
    source: Any = None,
    out: str | os.PathLike[str] | None = None,
    *,
    recipe: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    time_budget: str | None = None,
    quiet: bool = False,
    **sections: Any,
) -> Pretrained:
    """Pretrain a family of backbones of different depth: the job of `bim pretrain`, with its checks, files and records.

    Args:
        source: what `data.source` takes, or a `torch.utils.data.Dataset` of images: items that are a Pillow image, a uint8
            tensor (3, H, W) or a uint8 array (H, W, 3), or a tuple of one and a label. None: the recipe's.
        out: output directory; None: a new one below `runs`.
        recipe: name or file of a recipe; None: as the command, which chooses settings for images of your own.
        time_budget: bound of the training, such as "90m" or "6h", where the settings are chosen.
        settings: dotted keys and their values, `{"data.batch_size": 64}`.
        quiet: print only warnings and errors. Where the program has configured logging, nothing is printed here: lines are
            records of the logger `bim`.
        sections: settings as keywords: `blocks=4`, `seed=1`, and sections as mappings, `data={"batch_size": 64}`.

    In the main thread a signal stops the run as it stops the command, with a checkpoint; then the handlers of the program
    are back and get the signal: Ctrl-C is a KeyboardInterrupt. If they return, so does the function, with `stopped`.

    Raises:
        SettingsError, DataError, OutputError, PlacementError, TrackingError, ClusterError: wrong input; each is a
            ValueError, one sentence a line, before anything has started.
        TrainingError: the training cannot go on; the last checkpoint stays, and `resume=True` goes on from it. Also where a
            step that is timed before it begins fails.
        KeyboardInterrupt: Ctrl-C; as far as there is a checkpoint, `resume=True` goes on from it.
    """
    from bim.orchestrator.distributed.local_ray import before_ray_is_imported

    before_ray_is_imported()
    from bim.orchestrator.data.source import dataset_object, given
    from bim.orchestrator.jobs.automatic import automatic_settings, largest_batch_size
    from bim.orchestrator.jobs.job import run_job
    from bim.orchestrator.jobs.prepare import prepare
    from bim.orchestrator.reporting.console import console
    from bim.orchestrator.runs.step_times import read_times

    with ExitStack() as stack:
        stack.enter_context(console_unless_configured(quiet))
        stack.callback(setattr, console(), "quiet", console().quiet)
        console().quiet = quiet or console().quiet
        if not isinstance(source, str | os.PathLike | None):
            images = dataset_object(source)
            stack.enter_context(given(images))
            source = images.name
        options = settings_options(source, out, recipe, settings or {}, sections)
        if time_budget is not None:
            options.append(f"--time_budget={time_budget}")
        job = prepare(load_settings(options, automatic_settings, largest_batch_size))
        if file := recipe_file(options):
            read_times(file.parent)
        ended = run_job(job)
    if ended.stopped is not None and threading.current_thread() is threading.main_thread():
        signal.raise_signal(signal.Signals[ended.stopped])
    return _result(job.settings, ended.out, ended.table, ended.stopped, ended.failed)


def settings_options(
    source: str | os.PathLike[str] | None,
    out: str | os.PathLike[str] | None,
    recipe: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
    sections: Mapping[str, Any],
) -> list[str]:
    """The arguments of `pretrain` as those of the command: `--data.batch_size=64`, with values as YAML.

    Raises:
        SettingsError: a key is given twice, or a value is none that a setting can have.
    """
    values: dict[str, Any] = {}
    infos, problems = all_settings(), []
    named = {"data.source": source, "out": out, "recipe": recipe}
    given_values = [(key, value) for key, value in named.items() if value is not None]
    for key, value in (*given_values, *_flattened(settings), *_flattened(sections)):
        if key in values:
            problems.append(f"{key} is given twice")
        elif not isinstance(key, str) or "=" in key or not key:
            problems.append(unknown(str(key), list(infos)))
        else:
            values[key] = value
    options = []
    for key, value in values.items():
        try:
            options.append(f"--{key}={_text(key, value, infos.get(key))}")
        except SettingsError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("\n".join(problems))
    return options


def _flattened(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a section may be a mapping."""
    for key, value in settings.items():
        if key in setting_sections() and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _text(key: str, value: Any, info: SettingInfo | None) -> str:
    """A value as it is written on the command line. Raises SettingsError for one that is no plain value."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    is_text = key == "recipe" or (info is not None and info.is_text)
    if is_text and isinstance(value, str):
        return value
    allowed = "plain values: numbers, text, true, false, null and lists or mappings of them"
    if is_text and value is not None:
        allowed = "text" if info is None else info.allowed
        raise SettingsError(f"{key} must be {allowed}, not {format_value(value)}")
    try:
        return json.dumps(value, default=_plain, ensure_ascii=False)
    except (TypeError, ValueError):
        allowed = allowed if info is None else info.allowed
        raise SettingsError(f"{key} must be {allowed}, not a {type(value).__name__}") from None


def _plain(value: Any) -> Any:
    """What JSON does not know: paths, and scalars and arrays of NumPy and torch."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError


def _result(
    settings: Settings, out: Path, table: str, stopped: str | None, failed: tuple[str, ...]
) -> Pretrained:
    from bim.orchestrator.jobs.backbone_entries import backbone_entries

    if settings.backbones is None:
        return _of_one(settings, out, table, stopped)
    members = {
        name: _of_one(entry, out / name, "", stopped) for name, entry in backbone_entries(settings).items()
    }
    return Pretrained(
        out, table=table, stopped=stopped, failed=failed, backbones=members, plugins=settings.plugins
    )


def _of_one(settings: Settings, out: Path, table: str, stopped: str | None) -> Pretrained:
    from bim.orchestrator.export.timm_folder import folder_name
    from bim.orchestrator.reporting.comparison import read_rows
    from bim.orchestrator.reporting.summary import number

    try:
        rows = read_rows(out) if stopped is None else ()
    except (OSError, ValueError):  # one of several backbones that failed
        rows = ()
    depths = sorted(int(number(row["depth"])) for row in rows if row["weights"] == "trained")
    variants = {depth: out / "variants" / folder_name(depth) for depth in depths}
    return Pretrained(out, variants, rows, table, stopped, plugins=settings.plugins)
