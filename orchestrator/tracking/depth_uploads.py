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


class DepthUploads:
    """The uploads about the depths of one run, and which of them are to be ended with it.

    Args:
        out: the output directory of the run.
    """

    def __init__(self, queue: UploadQueue, out: Path) -> None:
        self._queue, self._out = queue, out
        self._start: int | None = None
        self._begun: dict[tuple[str, int], str] = {}
        self._evaluated: set[tuple[str, int]] = set()

    @property
    def is_empty(self) -> bool:
        """Whether this process has recorded nothing of any depth."""
        return not self._begun and not self._evaluated

    def begin(
        self, params: Mapping[int, Mapping[str, object]], series: str, dataset: Mapping[str, str] | None
    ) -> None:
        """See `Tracker.begin_depths`. dataset: on which they will be evaluated, if known."""
        now = now_ms()
        self._start = start = self._start or now
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
