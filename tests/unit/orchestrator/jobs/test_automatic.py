"""Automatic settings: what a search would cost is said, and a batch is split that a GPU does not hold."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from bim.orchestrator.distributed.placement import ClusterResources
from bim.orchestrator.jobs import automatic
from bim.orchestrator.jobs.automatic import automatic_settings
from bim.orchestrator.runs.provenance import Hardware
from bim.orchestrator.runs.step_probe import Probe, StepTimes


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that trains nothing, where the stages are."""

    def probe(probe: Probe, images: object = None) -> StepTimes:
        return StepTimes((0.01,) * len(probe.layout.stage_blocks), 0.001)

    monkeypatch.setattr("bim.orchestrator.jobs.cost.probe_steps", probe)
    monkeypatch.setattr("bim.orchestrator.jobs.cost._has_device", lambda layout: True)
    monkeypatch.setattr("bim.orchestrator.runs.step_times._known", {})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def gpu_of(mebibytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU with so much memory."""
    with_gpu = Hardware("a CPU", 16, 64.0, (f"a GPU, {mebibytes} MiB",))
    monkeypatch.setattr(automatic, "machine_resources", lambda: ClusterResources(16.0, 1.0))
    monkeypatch.setattr(automatic, "hardware", lambda: with_gpu)
    monkeypatch.setattr(automatic, "expected_precision", lambda settings, layout: "bf16")


def chosen(caplog: pytest.LogCaptureFixture, **given: Any) -> tuple[dict[str, Any], list[str]]:
    """Settings and the lines about them; given: with __ for the dots of keys."""
    caplog.clear()
    caplog.set_level(logging.INFO, "bim")
    keys = {key.replace("__", "."): value for key, value in given.items()}
    values = automatic_settings({"data.source": "synthetic:6000x32x32", **keys}, budget_s=3600.0)
    return values, caplog.messages


def test_a_line_says_what_a_search_would_cost(caplog: pytest.LogCaptureFixture) -> None:
    values, lines = chosen(caplog)
    (line,) = [line for line in lines if "no search" in line]
    match = re.fullmatch(
        r"  no search: --search\.trials 8 --search\.trial_epochs (\d+) would train for (?:(\d+) to )?(\d+) epochs more, "
        r"beside (\d+)",
        line,
    )
    assert match is not None
    trial_epochs, least, most, epochs = (int(number or 0) for number in match.groups())
    assert epochs == values["schedule"]["epochs"]
    assert trial_epochs == max(1, round(epochs / 16))
    assert least < most == 8 * trial_epochs
    assert not any("no search" in line for line in chosen(caplog, search__trials=2)[1])


def test_a_batch_that_the_memory_of_a_gpu_does_not_hold_is_split(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_of(80_000, monkeypatch)
    data, lines = chosen(caplog)
    whole = data["data"]["batch_size"]
    assert (data["data"].get("accumulate", 1), whole) == (1, 128)
    assert not any("parts" in line for line in lines)

    gpu_of(256, monkeypatch)
    data, lines = chosen(caplog)
    batch_size, parts = data["data"]["batch_size"], data["data"]["accumulate"]
    assert parts > 1
    assert batch_size * parts == whole
    assert f"  the batch in {parts} parts of {batch_size}: what the memory of a GPU holds" in lines
    assert not any("parts" in line for line in chosen(caplog, data__batch_size=whole)[1])
