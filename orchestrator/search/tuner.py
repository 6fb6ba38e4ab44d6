"""The search with Ray Tune: trials in placement groups of their own, started again once where they fail.

Tune runs the trials. Which they are, when one is stopped and what stays of them is decided and recorded by the controller.
Tune's own state is pickled: it goes to a temporary folder and is never read again.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from bim.orchestrator.config.transforms import settings_to_yaml, with_changes
from bim.orchestrator.files import make_folder
from bim.orchestrator.runs.lease import Lease
from bim.orchestrator.search.controller import SearchCallback, SearchController
from bim.orchestrator.search.proposals import proposer
from bim.orchestrator.search.record import FOLDER, save_result
from bim.orchestrator.search.results import SearchResult, with_best
from bim.orchestrator.search.spec import SearchSpec
from bim.orchestrator.search.trainable import make_trainable
from bim.orchestrator.search.trial import DRIVER_CPUS, remove_trial_checkpoints
from bim.orchestrator.training.callbacks import StopRequest

RETRIES = 1
"""Restarts of a trial that failed or died, from its last checkpoint."""

TUNE_FOLDER = ".tune-"
"""Begins the name of the temporary folder of Tune's own files, below that of the search: all nodes must see it."""

TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints even with verbose=0
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # result files and TensorBoard for every trial
}

UNWIND_TIMEOUT_S = 2.0
"""How long Tune gets to end the trials after a second signal."""


def search(
    spec: SearchSpec, out: Path, callback: SearchCallback, stop: StopRequest, lease: Lease | None = None
) -> SearchResult:
    """Run the search, or continue the one of which `spec.initial` is the record. Ray is connected.

    lease: of the output directory; trials have none of their own, and end with the search where it is lost.

    Returns the result; unfinished if `stop` was set meanwhile, so that it can be continued.

    Raises:
        TrainingError: no trial was trained to its end, the record cannot be written, or the lease is lost.
        PlacementError: the cluster has no room for a trial.
    """
    settings, trial = spec.settings.search, spec.trial
    propose = proposer(
        settings.searcher, spec.space, spec.initial.baseline_values, settings.trials, spec.settings.seed
    )
    controller = SearchController(spec, propose, out, callback, stop, lease)
    bundles = [{"CPU": DRIVER_CPUS}, *trial.layout.bundles]
    folder = out / FOLDER
    make_folder(folder)
    for stale in folder.glob(f"{TUNE_FOLDER}*"):
        shutil.rmtree(stale, ignore_errors=True)
    with (
        _quiet(),
        tempfile.TemporaryDirectory(dir=folder, prefix=TUNE_FOLDER, ignore_cleanup_errors=True) as storage,
    ):

        def run() -> None:
            tune.run(
                tune.with_resources(
                    make_trainable(trial), tune.PlacementGroupFactory(bundles, strategy="PACK")
                ),
                name="trials",
                storage_path=storage,
                num_samples=settings.trials,
                search_alg=_Searcher(controller),
                stop=_Stopper(controller),
                callbacks=[_Callback(controller)],
                max_concurrent_trials=trial.max_concurrent_trials,
                max_failures=RETRIES,
                raise_on_failed_trial=False,
                verbose=0,
            )

        _run_in_thread(run, stop)
    result = controller.finish()
    if result.finished:
        changes = {"out": None, "resume": False, "search.trials": 0, "search.resume": False}
        best = with_changes(with_best(spec.settings, result), changes)
        head = f"# The best of the {len(result.rows)} trials of a search: trial {result.best.number}\n"
        save_result(out, result, head + settings_to_yaml(best))
        remove_trial_checkpoints(trial)
    return result


class _Searcher(Searcher):
    """Takes the trials from the controller; their configuration is their number and their changes."""

    def __init__(self, controller: SearchController) -> None:
        super().__init__()
        self._controller = controller

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        row = self._controller.next_trial()
        return Searcher.FINISHED if row is None else {"number": row.number, "changes": row.changes}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The controller hears of it by the callback."""


class _Stopper(tune.Stopper):
    """Ends a trial, and the search, where the controller says so."""

    def __init__(self, controller: SearchController) -> None:
        self._controller = controller

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._controller.on_report(result["config"]["number"], result)

    def stop_all(self) -> bool:
        return self._controller.should_stop()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles it as part of its own state, which is never read."""
        return {}


class _Callback(tune.Callback):
    """Passes the beginnings and ends of trials to the controller."""

    def __init__(self, controller: SearchController) -> None:
        self._controller = controller

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._controller.on_start(trial.config["number"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._controller.on_complete(trial.config["number"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._controller.on_retry(trial.config["number"], _cause_of_death(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._controller.on_error(trial.config["number"], _cause_of_death(trial))


def _cause_of_death(trial: Any) -> str:
    """Why the process of a trial is gone, in a few words, from what Ray says of it."""
    text = ""
    with contextlib.suppress(OSError, TypeError):
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    if "running low on memory" in text:
        return "its process was killed because its machine ran low on memory"
    if "its node has died" in text:
        return "its machine was lost"
    return "its process died, possibly out of memory"


def _run_in_thread(run: Callable[[], None], stop: StopRequest) -> None:
    """Run Tune beside the main thread, where it leaves all signals alone and the main thread handles them at once.

    Raises what `run` raises, and what a signal handler raises meanwhile.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(
        target=contextvars.copy_context().run, args=(guarded,), name="tune", daemon=True
    )
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except BaseException:
        stop.reason = stop.reason or "SIGINT"
        thread.join(UNWIND_TIMEOUT_S)
        raise
    if errors:
        raise errors[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Tune prints nothing and writes no result files of its own."""
    before = {name: os.environ.get(name) for name in TUNE_ENVIRONMENT}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    os.environ.update(TUNE_ENVIRONMENT)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
