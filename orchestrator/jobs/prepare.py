"""Everything that can be checked before a cluster is there: settings, backbones, images, output directories."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bim.orchestrator.config.credentials import with_credentials
from bim.orchestrator.config.recipes import SAVED_SETTINGS
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.source import SOURCES, Source, given_source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.files import StorageError, os_error_text
from bim.orchestrator.jobs.backbone_entries import ErrorCollector, backbone_entries
from bim.orchestrator.jobs.search_job import check_search
from bim.orchestrator.reporting.comparison import read_rows
from bim.orchestrator.runs.checkpoints import check_checkpoint_storage
from bim.orchestrator.runs.depth_scores import ends_early, read_scores
from bim.orchestrator.runs.output_dir import (
    NEW_RUN_HINT,
    OutputError,
    check_output,
    check_resumable,
    open_store,
    resumed_record,
    saved_settings,
)
from bim.orchestrator.runs.prepare import PreparedBackbone, ResolvedRun, resolve_backbone
from bim.orchestrator.runs.resolve import load_plugins
from bim.orchestrator.runs.run_identity import read_identity
from bim.orchestrator.search.record import finished_search
from bim.orchestrator.search.results import with_best
from bim.orchestrator.text import short_path
from bim.orchestrator.tracking.open_run import TrackingError, check_model_name
from bim.orchestrator.training.errors import StorageUnsupportedError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedJob:
    """A job whose input is known to be good; nothing has been started and nothing written.

    Args:
        backbones: one, whose files lie in `out` itself, or those of `settings.backbones`, each in its own folder.
    """

    settings: Settings
    out: Path
    backbones: tuple[PreparedBackbone, ...]

    @property
    def compares(self) -> bool:
        """Whether the job is one of `settings.backbones`, which are compared."""
        return self.settings.backbones is not None


def prepare(settings: Settings) -> PreparedJob:
    """Check every backbone of a job. All that is wrong is in the error, with the backbone that it is wrong with.

    Raises:
        SettingsError, DataError, OutputError: one line for every problem.
    """
    try:
        return _prepare(settings)
    except OSError as error:  # no permission, a network share that fails
        raise OutputError(f"the output directory cannot be used: {os_error_text(error)}") from error


def _prepare(settings: Settings) -> PreparedJob:
    load_plugins(settings)
    if settings.plugins:
        log.info("plugins: %s", ", ".join(settings.plugins))
    settings, out = resolve_paths(with_credentials(settings, os.environ))
    check_model_names(settings)
    if settings.backbones is None:
        backbone = prepare_backbone(settings)
        return PreparedJob(backbone.run.settings, out, (backbone,))
    check_output(out, settings, fingerprint="")
    entries = backbone_entries(settings)
    if settings.resume:
        _check_none_left_out(out, entries.keys())
    backbones: list[PreparedBackbone] = []
    errors = ErrorCollector(SettingsError, DataError, OutputError)
    for name, entry in entries.items():
        begun = settings.resume and (out / name / SAVED_SETTINGS).exists()
        opened = (backbones[0].source, backbones[0].splits) if backbones else None
        remedy = f"remove the folder {short_path(out / name)} to train this backbone again from the beginning"
        with errors.of(name):
            changes = {"resume": begun, "from_scratch": begun and settings.from_scratch}
            backbone = prepare_backbone(with_changes(entry, changes), opened, remedy)
            with _storage_refusals():
                finished = begun and _is_finished(backbone.run)
            backbones.append(replace(backbone, name=name, finished=finished))
    errors.raise_if_any()
    return PreparedJob(settings, out, tuple(backbones))


def prepare_backbone(
    settings: Settings, opened: tuple[Source, Splits] | None = None, remedy: str = NEW_RUN_HINT
) -> PreparedBackbone:
    """Check one backbone: its settings, its images, its output directory, and the search that comes first.

    Args:
        opened: the images and their split, if they are open already and of the same settings.
        remedy: what the user does to train with other settings than those of the run in the output directory.

    Raises:
        SettingsError, DataError, OutputError: one clear sentence.
    """
    with _storage_refusals():
        return _prepare_backbone(settings, opened, remedy)


@contextmanager
def _storage_refusals() -> Iterator[None]:
    """Inside, a storage that refuses or cannot be reached is wrong input, as nothing has been started yet."""
    try:
        yield
    except StorageUnsupportedError as error:
        raise SettingsError(f"checkpoint.storage {error}") from error
    except StorageError as error:
        setting = "checkpoint.storage " if "://" in str(error.filename) else ""
        raise OutputError(f"{setting}{error}") from error


def _prepare_backbone(
    settings: Settings, opened: tuple[Source, Splits] | None, remedy: str
) -> PreparedBackbone:
    settings, out = resolve_paths(settings)
    if settings.resume or settings.search.resume:
        settings = with_best(with_changes(settings, {"resume": True}), finished_search(out))
    backbone = resolve_backbone(settings, out, opened)
    check_checkpoint_storage(out, settings)
    check_output(
        out, settings, backbone.run.fingerprint, remedy, lambda saved: with_best(saved, finished_search(out))
    )
    if settings.resume and backbone.baseline is not None and backbone.baseline.out.exists():
        baseline = backbone.baseline.out
        record = read_identity(baseline) or replace(resumed_record(out), has_checkpoint=False)
        check_resumable(open_store(baseline, record), record, settings.from_scratch)
    check_search(backbone)
    return backbone


def check_model_names(settings: Settings) -> None:
    """Raise SettingsError if MLflow would refuse the name of the registered models, at the end of the training."""
    try:
        check_model_name(settings.tracking.model_name or settings.name)
    except TrackingError as error:
        raise SettingsError(str(error)) from None


def resolve_paths(settings: Settings) -> tuple[Settings, Path]:
    """The settings with absolute paths, which hold in the working directory of any actor; and the output directory."""
    out = settings.out or Path("runs") / f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    paths = {"out": str(Path(os.path.expanduser(out)).absolute())}
    for key, value in {"data.source": settings.data.source, "init_from": settings.init_from}.items():
        if key == "data.source" and (value in SOURCES or given_source(value or "") is not None):
            continue  # a file in the working directory may have the same name
        # "local-dir:DIR" and "torchvision:NAME:ROOT" end in a path too.
        scheme, colon, path = (value or "").rpartition(":")
        if path and os.path.exists(path):
            paths[key] = f"{scheme}{colon}{Path(path).absolute()}"
    return with_changes(settings, paths), Path(paths["out"])


def _check_none_left_out(out: Path, names: Collection[str]) -> None:
    """Refuse a resumed job that leaves out a backbone which was begun: the new table would be without its rows.

    Raises:
        OutputError: naming those that are left out.
    """
    saved = settings_from_mapping(saved_settings(out))
    begun = [name for name in backbone_entries(saved) if (out / name / SAVED_SETTINGS).exists()]
    missing = ", ".join(name for name in begun if name not in names)
    if missing:
        raise OutputError(
            f"{short_path(out)} has backbones that --backbones does not name: {missing}; name them too, remove their "
            "folders, or start a new run with another --out"
        )


def _is_finished(run: ResolvedRun) -> bool:
    """Whether an earlier process trained the run to its end and evaluated it as it would be evaluated now.

    With a table of results that cannot be read it is not: the last checkpoint is evaluated again.
    """
    latest = open_store(run.out).latest()
    if latest is None:
        return False
    if latest.step < run.total_steps and not ends_early(
        read_scores(run.out), run.settings.evaluation.patience
    ):
        return False
    try:
        read_rows(run.out)
    except (OSError, ValueError):
        return False
    saved = settings_from_mapping(saved_settings(run.out))
    return (saved.evaluation, saved.baseline) == (run.settings.evaluation, run.settings.baseline)
