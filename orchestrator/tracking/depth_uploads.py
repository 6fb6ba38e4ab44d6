"""What a run puts into its queue of uploads about its depths: their beginning, their scores, their end.

Part of `tracker.py`; `variant_runs` writes it into the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bim.orchestrator.tracking.descriptions import downsample
from bim.orchestrator.tracking.records import DepthRecord
from bim.orchestrator.tracking.run_writer import now_ms
from bim.orchestrator.tracking.upload_queue import UploadQueue

BASELINE_LAG_MS = 1000
"""How much earlier the runs of a baseline's depths start, so that MLflow lists them below those of the run's own."""

TRIALS_LAG_MS = 1000
"""How much earlier than those the runs of all trials start, see `trial_runs`."""


class DepthUploads:
    """The uploads about the depths of one run, and which of them are to be ended with it.

    Args:
        out: the output directory of the run.
        parent_start: Unix time in milliseconds at which its run starts in MLflow.
    """

    def __init__(self, queue: UploadQueue, out: Path, parent_start: int) -> None:
        self._queue, self._out = queue, out
        self._earliest = parent_start + TRIALS_LAG_MS + BASELINE_LAG_MS
        self._start: int | None = None
        self._begun: dict[tuple[str, int], str] = {}
        self._evaluated: set[tuple[str, int]] = set()

    def begin(
        self, params: Mapping[int, Mapping[str, object]], series: str, dataset: Mapping[str, str] | None
    ) -> None:
        """See `Tracker.begin_depths`. dataset: on which they will be evaluated, if known."""
        now = now_ms()
        self._start = start = self._start or max(now, self._earliest)
        for depth in params:
            self._begun[series, depth] = DepthRecord(depth, self._out, {}, series=series).title
        arguments = {
            "series": series,
            "params": {str(depth): _texts(values) for depth, values in params.items()},
            "milliseconds": now,
            "start": start - BASELINE_LAG_MS if series else start,
            "dataset": dataset,
        }
        self._queue.put(f"{series} depths".strip(), "begin_depths", arguments)

    def add_metrics(self, step: int, values: Mapping[int, Mapping[str, float]], series: str) -> None:
        """See `Tracker.log_depth_metrics`."""
        plain = {str(depth): {name: float(x) for name, x in of.items()} for depth, of in values.items()}
        arguments = {"series": series, "step": int(step), "values": plain}
        self._queue.put(f"{series} depths at step {step}".strip(), "depth_metrics", arguments)

    def add_evaluated(self, record: DepthRecord, model_name: str, dataset: Mapping[str, str] | None) -> None:
        """See `Tracker.log_depth`."""
        plain = record.to_plain(self._out)
        plain["curves"] = {key: downsample(curve) for key, curve in record.curves.items()}
        arguments = {"record": plain, "model_name": model_name, "dataset": dataset}
        self._queue.put(record.title, "depth", arguments)
        self._evaluated.add((record.series, record.depth))

    def end(self, status: str) -> list[dict[str, Any]]:
        """End those that were not evaluated, and those whose evaluation may not be sent before this process ends.

        Returns the arguments of `RunWriter.end_depth` for each.
        """
        waiting = {upload.name for upload in self._queue.waiting()} if status != "FINISHED" else set()
        now, ends = now_ms(), []
        for (series, depth), title in self._begun.items():
            if (series, depth) not in self._evaluated or title in waiting:
                end = {"series": series, "depth": depth, "status": status, "milliseconds": now}
                self._queue.put(f"the end of {title}", "end_depth", end, first=True)
                ends.append(end)
        return ends


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}
