"""Several backbones in one launch: each trained on stages of its own, as room comes free; compared in one table.

How they are trained at the same time is in `courses.py`. MLflow is spoken to and what is timed on a CPU is timed by the main
thread alone; what shared a GPU is timed on a GPU of the cluster, when all have ended. One that fails does not stop the
others. In one process (`placement.backend in_process`) they take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bim.orchestrator.config.recipes import SAVED_SETTINGS, read_recipe
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.transforms import settings_to_yaml, with_changes
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.cluster import run_on_worker
from bim.orchestrator.distributed.placement import ClusterResources, PlacementError, StageLayout, shares
from bim.orchestrator.evaluation.features import MAX_IMAGES
from bim.orchestrator.jobs.concurrent_runs import (
    BackboneRun,
    clear_failure,
    format_error,
    record_failure,
    run_concurrently,
)
from bim.orchestrator.jobs.evaluate_checkpoint import add_latency
from bim.orchestrator.jobs.job import (
    BAD_INPUT,
    JobResult,
    Say,
    absolute,
    cluster_of,
    keep_settings,
    open_tracker,
    prepare,
    resolved,
    write_settings,
)
from bim.orchestrator.jobs.members import ErrorCollector, members
from bim.orchestrator.jobs.records import data_record, record_comparison, record_depths, record_summary
from bim.orchestrator.reporting.closing import several_closing_lines
from bim.orchestrator.reporting.comparison import MemberResult, read_rows
from bim.orchestrator.reporting.startup import opening_lines
from bim.orchestrator.runs.output_dir import OutputError, check_output, make_output, new_output
from bim.orchestrator.runs.prepare import PreparedJob, ResolvedRun
from bim.orchestrator.runs.provenance import collect
from bim.orchestrator.runs.signals import Interrupted, interrupted_by_signals
from bim.orchestrator.runs.train import check_precision, resolve_layout, resolve_precision
from bim.orchestrator.text import short_path
from bim.orchestrator.tracking.tracker import Tracker
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore


@dataclass(frozen=True)
class PreparedMember:
    """One backbone of several, checked; `finished`: an earlier process brought it to its end."""

    name: str
    prepared: PreparedJob
    finished: bool


@dataclass(frozen=True)
class PreparedJobs:
    """A run of several backbones whose input is known to be good; nothing has been started and nothing written."""

    settings: Settings
    out: Path
    members: tuple[PreparedMember, ...]


def prepare_several(settings: Settings) -> PreparedJobs:
    """Check every backbone, as `prepare` does for one. All that is wrong is told, with the backbone that it is wrong with.

    Raises:
        SettingsError, DataError, OutputError: one line for every problem.
    """
    settings, out = absolute(settings)
    check_output(out, settings, fingerprint="")
    prepared: list[PreparedMember] = []
    opened: tuple[Source, Splits] | None = None
    problems = ErrorCollector(*BAD_INPUT)
    wanted = members(settings)
    _check_none_is_missing(out, settings, [member.name for member in wanted])
    for member in wanted:
        begun = settings.resume and (out / member.name / SAVED_SETTINGS).exists()
        with problems.of(member.name):
            anew = f"remove the folder {short_path(out / member.name)} to train this backbone anew"
            one = prepare(with_changes(member.settings, {"resume": begun}), opened, anew)
            opened = one.source, one.splits
            prepared.append(PreparedMember(member.name, one, begun and _finished(one.family)))
    problems.tell()
    return PreparedJobs(settings, out, tuple(prepared))


def _check_none_is_missing(out: Path, settings: Settings, names: list[str]) -> None:
    """Refuse a resumed run that leaves out a backbone which was begun: the new table would be without its rows.

    Raises:
        OutputError: naming those that are left out.
    """
    if not settings.resume:
        return
    before = settings_from_mapping(read_recipe(str(out / SAVED_SETTINGS)))
    begun = [member.name for member in members(before) if (out / member.name / SAVED_SETTINGS).exists()]
    missing = ", ".join(name for name in begun if name not in names)
    if missing:
        raise OutputError(
            f"{short_path(out)} has backbones that --backbones does not name: {missing}; name them too, remove their "
            "folders, or start a new run with another --out"
        )


def _finished(family: ResolvedRun) -> bool:
    """Whether an earlier process trained it to its end and measured it as it would be measured now."""
    latest = CheckpointStore(family.out).latest()
    if latest is None or latest.step < family.total_steps or not (family.out / "summary.json").exists():
        return False
    before = settings_from_mapping(read_recipe(str(family.out / SAVED_SETTINGS)))
    now = family.settings
    return (before.evaluation, before.baseline) == (now.evaluation, now.baseline)


def run_several(prepared: PreparedJobs, say: Say) -> JobResult:
    """Train, measure, export, record and compare all of them. See `JobResult`.

    Raises:
        OutputError, PlacementError, TrackingError, ClusterError: before the first actor starts.
    """
    try:
        return _run(prepared, say)
    except KeyboardInterrupt as interrupt:  # while Ray waits, it makes a bare one of an Interrupted
        name = interrupt.name if isinstance(interrupt, Interrupted) else "SIGINT"
        return JobResult(prepared.out, name)


def _run(prepared: PreparedJobs, say: Say) -> JobResult:
    settings, out = prepared.settings, prepared.out
    width = max(len(member.name) for member in prepared.members)
    with ExitStack() as stack:
        cluster = cluster_of(settings, stack, say)
        stack.enter_context(interrupted_by_signals())
        waiting = [member for member in prepared.members if not member.finished]
        layouts = _layouts(waiting, settings.placement.gpus_per_stage, cluster)
        precisions = [resolve_precision(m.prepared.family.settings, layouts[m.name][0][1]) for m in waiting]
        for member, precision in zip(waiting, precisions, strict=True):
            check_precision(member.prepared.family.out, precision)
        with new_output(out):
            comparison = stack.enter_context(_open_comparison(prepared))
        _keep_comparison(prepared, comparison, cluster)
        courses = []
        for member, precision in zip(waiting, precisions, strict=True):
            family, plans = member.prepared.family, layouts[member.name]
            facts = resolved(family, plans[0][1], precision, cluster)
            provenance = collect(data_record(member.prepared), facts)
            make_output(family.out)
            write_settings(family)  # before anything else: by this file --resume knows that it was begun
            title = f"{out.name}/{member.name}"
            tracker = stack.enter_context(open_tracker(family, title, comparison.run_id))
            keep_settings(family, tracker)
            tracker.log_provenance(provenance)
            prefixed = _prefixed(say, member.name.ljust(width))
            courses.append(
                BackboneRun(member.name, member.prepared, plans, precision, provenance, tracker, prefixed)
            )
        for line in _opening(prepared, courses):
            say(line)
        stop = StopRequest()
        results = {m.name: _result(m.name, m.prepared) for m in prepared.members if m.finished}

        def note(course: BackboneRun) -> None:
            if course.failed is not None or (course.measured and not course.latency_pending):
                results[course.name] = _record(course)

        run_concurrently(courses, stop, say, note)
        open_ones = [course for course in courses if course.name not in results]
        if open_ones and stop.reason is not None:
            for course in open_ones:
                course.tracker.finish("KILLED")
            comparison.finish("KILLED")
            return JobResult(out, stop.reason)
        if open_ones:
            say("timing every depth, now that nothing else runs")
        for course in open_ones:
            results[course.name] = _record(course)
        ordered = [results[member.name] for member in prepared.members]
        runs = {member.name: Tracker.recorded_run(out / member.name) for member in prepared.members}
        tested = _tested(prepared, courses)
        table = record_comparison(comparison, ordered, runs, tested, _device(courses))
        failed = tuple(f"{result.name} failed: {result.failed}" for result in ordered if result.failed)
        closing = several_closing_lines(out, ordered, comparison.ui_hint())
        comparison.finish("FAILED" if failed else "FINISHED")
    return JobResult(out, None, table, tuple(closing), failed)


# -- before the start ---------------------------------------------------------------------------------------------


def _layouts(
    waiting: list[PreparedMember], asked: float | None, cluster: ClusterResources
) -> dict[str, list[tuple[ResolvedRun, StageLayout]]]:
    """For every backbone the family, and its baseline if there is one, each with the layout that it is trained on.

    Each is planned on its share of the cluster; what was asked for and is more is planned on all of it, and waits for that.
    waiting: those that are still to be trained. asked: `placement.gpus_per_stage`.
    """
    families = [member.prepared.family for member in waiting]
    parts = shares([family.settings.num_blocks for family in families], cluster, asked)
    found: dict[str, list[tuple[ResolvedRun, StageLayout]]] = {}
    problems = ErrorCollector(PlacementError)
    for member, part in zip(waiting, parts, strict=True):
        alone = [f for f in (member.prepared.family, member.prepared.baseline) if f is not None]
        with problems.of(member.name):
            found[member.name] = [
                (family, _layout(family.settings, cluster, part.cluster, part.stages)) for family in alone
            ]
    problems.tell()
    return found


def _layout(settings: Settings, whole: ClusterResources, part: ClusterResources, stages: int) -> StageLayout:
    if settings.placement.backend != "ray":
        return resolve_layout(settings, whole)
    shared = settings
    grows = settings.placement.wait_s > 0 and settings.placement.gpus_per_stage
    if settings.placement.stages is None and not grows:
        shared = with_changes(settings, {"placement.stages": min(stages, settings.num_blocks)})
    # GPUs are divided by the number of stages, CPUs by the part.
    try:
        return resolve_layout(shared, ClusterResources(part.cpus, whole.gpus, part.nodes))
    except PlacementError:
        return resolve_layout(settings, whole)


def _open_comparison(prepared: PreparedJobs) -> Tracker:
    """The record above those of all backbones: their table, and the picture of their costs and scores."""
    track, out = prepared.settings.tracking, prepared.out
    continued = Tracker.recorded_run(out) if prepared.settings.resume else None
    return Tracker.open(track.uri, track.experiment, out.name, out, continued, track.model_name)


def _keep_comparison(prepared: PreparedJobs, tracker: Tracker, cluster: ClusterResources) -> None:
    settings = with_changes(prepared.settings, {"resume": False})
    text = settings_to_yaml(settings)
    (prepared.out / SAVED_SETTINGS).write_text(text, encoding="utf-8")
    shown = {
        "backbones": ", ".join(member.name for member in prepared.members),
        "data.source": settings.data.source,
        "schedule.epochs": settings.schedule.epochs,
        "seed": settings.seed,
    }
    tracker.log_settings(shown, text)
    facts = {"cluster": f"{cluster.cpus:g} CPU, {cluster.gpus:g} GPU"}
    tracker.log_provenance(collect(data_record(prepared.members[0].prepared), facts))


def _opening(prepared: PreparedJobs, courses: list[BackboneRun]) -> Iterator[str]:
    """What is about to happen; what is the same for all backbones is said once."""
    if prepared.settings.search.trials:
        yield (
            f"no search: every backbone is trained with the settings as they are (search.trials "
            f"{prepared.settings.search.trials} is for one backbone)"
        )
    for member in prepared.members:
        if member.finished:
            yield f"{member.name}: trained and measured before"
    said: set[str] = set()
    for course in courses:
        for line in opening_lines(course.prepared.family, course.prepared, course.plans[0][1])[:-1]:
            if line.startswith(f"{prepared.settings.data.source}: "):
                if line not in said:
                    yield line
                said.add(line)
            else:
                course.say(line.removeprefix(f"{course.name}: "))
    yield f"output: {short_path(prepared.out)}"


def _prefixed(say: Say, name: str) -> Say:
    def prefixed(text: str) -> None:
        for line in text.splitlines():
            say(f"{name}  {line}")

    return prefixed


# -- when they have ended -----------------------------------------------------------------------------------------


def _record(course: BackboneRun) -> MemberResult:
    """How one backbone ended, in its folder and in MLflow, as for a run of its own; what is still to be timed is."""
    family, tracker = course.prepared.family, course.tracker
    try:
        if course.failed is None:
            if course.latency_pending:
                _time(course)
            own, *baseline = course.found
            record_depths(tracker, family, own)
            if course.prepared.baseline is not None:
                record_depths(tracker, course.prepared.baseline, baseline[0], series="mae")
            record_summary(tracker, family, own, baseline[0] if baseline else None)
            clear_failure(course)
            tracker.finish("FINISHED")
            return _result(course.name, course.prepared)
    except Exception as error:  # the others have their results all the same
        record_failure(course, error)
    tracker.set_tags({"failed": course.failed or ""})
    tracker.finish("FAILED")
    named, size = family.settings.backbone.name, family.backbone.image_size
    return MemberResult(course.name, named, size, failed=course.failed)


def _time(course: BackboneRun) -> None:
    """The latencies that waited until nothing else runs. What cannot be timed is left without, and said."""
    for number, ((family, layout), job) in enumerate(zip(course.plans, course.jobs, strict=True)):
        part = course.found[number]
        on_ray = family.settings.placement.backend == "ray"
        try:
            course.found[number] = (
                run_on_worker(add_latency, layout, job, part) if on_ray else add_latency(job, part)
            )
        except Exception as error:  # a measurement must not cost what was trained
            line = f"no latencies{' of the baseline' if number else ''}: {format_error(error)}"
            course.say(line)
            course.tracker.log_event(line)


def _result(name: str, prepared: PreparedJob) -> MemberResult:
    """Of a backbone that came to its end, from what it left in its folder."""
    family = prepared.family
    rows: Any = read_rows(family.out)
    return MemberResult(name, family.settings.backbone.name, family.backbone.image_size, rows)


def _tested(prepared: PreparedJobs, courses: list[BackboneRun]) -> int:
    """Test images that the accuracies were counted on: as reported now, or as an earlier process must have."""
    found = [report.n_test for course in courses for part in course.found for report in part.reports]
    return max(found, default=0) or min(len(prepared.members[0].prepared.splits.test), MAX_IMAGES)


def _device(courses: list[BackboneRun]) -> str:
    """What latencies were measured on, if this process measured any."""
    found = (report.device for course in courses for part in course.found for report in part.reports)
    return next((device for device in found if device), "")
