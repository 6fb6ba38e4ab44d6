"""Settings chosen from the images and the machine by the rules of `config/auto.yaml`; each choice is a line with its reason.

A function of facts: it opens nothing. What a training costs comes from the caller, who measures it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from bim.orchestrator.config.auto_rules import AutoRules, Device, auto_rules
from bim.orchestrator.config.durations import seconds
from bim.orchestrator.config.messages import format_value
from bim.orchestrator.data.facts import ImageFacts
from bim.orchestrator.runs.auto_candidates import Candidate, candidate_values, candidates, is_given
from bim.orchestrator.runs.resolve import spread_scores
from bim.orchestrator.text import duration

EpochSeconds = Callable[[Mapping[str, Any]], float]
"""From settings, by dotted key, to the seconds of an epoch of theirs on this machine."""

ROUNDED_FROM = 4
"""Epochs that the time allows are rounded down from so many steps of rounding on."""


@dataclass(frozen=True)
class StageResources:
    """What the stages may use; without a GPU they run on the CPUs."""

    cpus: int
    gpus: int = 0

    @property
    def device(self) -> Device:
        return "gpu" if self.gpus else "cpu"


@dataclass
class Chosen:
    """Settings by dotted key, and what was chosen: a line for each choice."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def choose_settings(
    facts: ImageFacts,
    machine: StageResources,
    given: Mapping[str, Any],
    budget_s: float | None,
    epoch_seconds: EpochSeconds,
    rules: AutoRules | None = None,
) -> Chosen:
    """Settings for these images, on this machine, within this time.

    Where the time does not suffice, epochs are cut down to `epochs.min`; then image size and backbone shrink in turns.

    Args:
        given: dotted key -> value of what the user set; no rule touches it.
        budget_s: seconds of training; None: by the rules.
    """
    return _Chooser(facts, machine, given, budget_s, epoch_seconds, rules or auto_rules()).choose()


class _Chooser:
    def __init__(
        self,
        facts: ImageFacts,
        machine: StageResources,
        given: Mapping[str, Any],
        budget_s: float | None,
        epoch_seconds: EpochSeconds,
        rules: AutoRules,
    ) -> None:
        self._facts, self._machine, self._rules = facts, machine, rules
        self._given, self._epoch_seconds = dict(given), epoch_seconds
        self._device = machine.device
        self._budget_s = budget_s or seconds(rules.time_budget[self._device])
        self._chosen = Chosen()

    def choose(self) -> Chosen:
        rules, facts = self._rules, self._facts
        name = _run_name(facts.source)
        self._set({"name": name}, f"name {name}: of the images")
        self._set(rules.always_values)
        train = self._splits()
        if train < rules.few_images and "init_from" not in self._given:
            self._chosen.lines.append(
                f"{train} training images are few: where timm's weights can be had, a warm start from them "
                "(--backbone.name NAME --init_from NAME, as timm calls them) is likely to be better than any training "
                "from scratch"
            )
        batch_size = self._step(train)
        wanted = self._wanted_epochs(train)
        needed = wanted if "schedule.epochs" in self._given else min(wanted, rules.epochs.min)
        choices = list(candidates(rules, facts, self._device, self._given, train))
        first = choices[0]
        for candidate in choices:
            values = candidate_values(candidate, self._rules, self._given) | {
                "schedule.epochs": wanted,
                "schedule.warmup_epochs": 0.0,
                "data.workers": self._workers,
            }
            epoch_s = self._epoch_seconds(self._chosen.values | values | self._given)
            fitting = int(self._budget_s / epoch_s) if epoch_s > 0 else wanted
            if fitting >= needed or candidate is choices[-1]:
                break
        self._backbone(candidate, first, train)
        self._epochs(wanted, min(wanted, fitting), epoch_s)
        self._scores(epoch_s)
        self._loading()
        self._always()
        self._chosen.values["data.batch_size"] = batch_size
        return self._chosen

    def _set(self, values: Mapping[str, Any], line: str | None = None) -> None:
        """Take values that the user has not given, and say so if there is one."""
        free = {key: value for key, value in values.items() if not is_given(key, self._given)}
        self._chosen.values |= free
        if free and line is not None:
            self._chosen.lines.append(line)

    def _always(self) -> None:
        """A line for each group of settings that every automatic run has, with those that the user has not given."""
        for rule in self._rules.always:
            self._line_of(rule.settings, rule.reason)

    def _line_of(self, values: Mapping[str, Any], reason: str | None) -> None:
        """`decoder.depth 1, target.name pixels: REASON`, of what the user has not given, if there is a reason."""
        free = [
            f"{key} {value if isinstance(value, str) else format_value(value)}"
            for key, value in values.items()
            if not is_given(key, self._given)
        ]
        if free and reason is not None:
            self._chosen.lines.append(f"{', '.join(free)}: {reason}")

    def _splits(self) -> int:
        """Fractions of the splits that the data has not; returns the number of training images that remain."""
        splits = self._facts.splits
        pool = train = splits["train"]
        for name in ("test", "val"):
            key, rule = f"data.{name}_fraction", self._rules.splits[name]
            if name in splits:
                continue
            why = "the data has none"
            if name in self._facts.unlabeled_splits:
                why = f"the {self._facts.unlabeled_splits[name]} of the data's own have no labels"
            images = min(rule.max_images, max(rule.min_images, round(rule.fraction * pool)))
            fraction = min(math.ceil(1e4 * images / pool) / 1e4, 0.5 if name == "test" else 0.25)
            self._set(
                {key: fraction},
                f"{name} split {fraction:g}: {round(fraction * pool)} of {pool} images, as {why}",
            )
            train -= round(self._given.get(key, fraction) * pool)
        return max(train, 1)

    def _step(self, train: int) -> int:
        """The batch, so that an epoch has enough steps, and the learning rate for it. Returns `data.batch_size`."""
        steps = self._rules.steps
        most = min(steps.images_per_step[self._device], train // steps.min_per_epoch)
        images = 2 ** max(0, int(math.log2(max(most, 1))))
        accumulate = int(self._given.get("data.accumulate", 1))
        batch_size = int(self._given.get("data.batch_size", max(1, images // accumulate)))
        images = batch_size * accumulate
        rates = self._rules.learning_rate
        rate = next((row.lr for row in rates if images <= row.max_images_per_step), rates[-1].lr)
        self._set(
            {"data.batch_size": batch_size, "data.accumulate": 1},
            f"batch {batch_size}{f' x {accumulate}' if accumulate > 1 else ''}: {train // images} steps an epoch of "
            f"{train} training images",
        )
        blr = float(f"{rate * 256 / images:.3g}")
        self._set(
            {"optim.blr": blr},
            f"learning rate {rate:g} at its peak (optim.blr {blr:g}): for {images} images a step",
        )
        return batch_size

    def _wanted_epochs(self, train: int) -> int:
        rule = self._rules.epochs
        epochs = min(rule.max, max(rule.min, round(rule.images / train)))
        return int(self._given.get("schedule.epochs", _rounded(epochs, rule.round_to)))

    def _backbone(self, candidate: Candidate, first: Candidate, train: int) -> None:
        values = candidate_values(candidate, self._rules, self._given)
        backbone, size = candidate.backbone, candidate.size
        if backbone is None or size is None:
            self._set(values)
            self._line_of({"decoder.dim": values["decoder.dim"]}, "the default")
            return
        shrunk = f"; {duration(self._budget_s)} of training do not suffice for more"
        width = self._given.get("backbone.model_args.embed_dim", backbone.width)
        depth = self._given.get(
            "backbone.model_args.depth", values.get("backbone.model_args.depth", backbone.depth)
        )
        most, short = self._rules.image_size.max[self._device], self._facts.short_side_px
        why = f"half of the images have {short} px or more on their short side"
        if size == most < short:
            why += f", and {most} is the most on a {self._device.upper()}"
        patch = values.get(
            "backbone.model_args.patch_size", self._given.get("backbone.model_args.patch_size")
        )
        self._set(
            {
                key: value
                for key, value in values.items()
                if key.endswith((".img_size", ".patch_size", "crop_scale"))
            },
            f"image size {size} px in patches of {patch}: {why}{shrunk if size != first.size else ''}",
        )
        self._set(
            {key: value for key, value in values.items() if key not in self._chosen.values},
            f"backbone {backbone.name}, width {width}, {depth} layers: the largest for {train} training "
            f"images on a {self._device.upper()}{shrunk if backbone != first.backbone else ''}",
        )
        beside = {key: value for key, value in values.items() if key in ("decoder.dim", "data.crop_scale")}
        self._line_of(beside, "by the width of the backbone and the image size")

    def _epochs(self, wanted: int, epochs: int, epoch_s: float) -> None:
        rule = self._rules.epochs
        if epochs < wanted and "schedule.epochs" in self._given:
            self._chosen.lines.append(
                f"{wanted} epochs would take {duration(wanted * epoch_s)}: more than the {duration(self._budget_s)} of the "
                "time budget, in which " + (f"{epochs} are done" if epochs else "not even one is done")
            )
        if epochs < 1:
            epochs = 1
            why = (
                f"it takes {duration(epoch_s)}, and the time budget of {duration(self._budget_s)} is for less"
            )
        elif epochs < wanted:
            if epochs >= ROUNDED_FROM * rule.round_to:  # of fewer, too many would be lost
                epochs = epochs // rule.round_to * rule.round_to
            why = f"what {duration(self._budget_s)} allow; {wanted} would take {duration(wanted * epoch_s)}"
        else:
            why = f"about {duration(epochs * epoch_s)} of training"
        self._set({"schedule.epochs": epochs}, f"{epochs} epoch{'s' * (epochs > 1)}: {why}")
        epochs = int(self._given.get("schedule.epochs", epochs))
        warmup = round(min(rule.max_warmup, rule.warmup_fraction * epochs), 1)
        self._set({"schedule.warmup_epochs": warmup}, f"{warmup:g} epochs of warm-up")
        every = max(1.0, round(epochs / self._rules.checkpoints))
        self._set({"checkpoint.every_epochs": every}, f"a checkpoint every {every:g} epochs")

    def _scores(self, epoch_s: float) -> None:
        """How often the depths are scored while they train; a given patience counts scores, so their number stays."""
        rule, key = self._rules.scores, "evaluation.every_epochs"
        if is_given("evaluation.patience", self._given):
            return
        epochs = int((self._chosen.values | self._given)["schedule.epochs"])
        every = spread_scores(epochs, rule.most)
        if epoch_s > 0:
            every = max(every, math.ceil(rule.min_seconds_between / epoch_s))
        if every < epochs:
            spacing = f"{every} epochs" if every > 1 else "epoch"
            line = f"depths are scored every {spacing}, about {duration(every * epoch_s)} of training"
            self._set({key: every}, line)
        else:
            apart = duration(rule.min_seconds_between)
            why = f"scores would be less than {apart} apart" if epochs > 1 else "it has one epoch"
            self._set({key: 0}, f"depths are scored at the end of the training alone: {why}")

    @property
    def _workers(self) -> int:
        rule = self._rules.workers
        return min(rule.max, int(rule.per_cpu[self._device] * self._machine.cpus))

    def _loading(self) -> None:
        workers = self._workers
        line = f"{workers} data workers beside the loader, for {self._machine.cpus} CPUs"
        self._set({"data.workers": workers}, line)


def _run_name(source: str) -> str:
    """The folder, the file without `.parquet`, torchvision's name of a data set, or what a plugin calls the images."""
    kind, _, rest = source.partition(":")
    if kind == "torchvision":
        name = rest.partition(":")[0]
    elif rest and not source.startswith(("/", ".", "~")):
        name = source
    else:
        name = PurePath(source).name.removesuffix(".parquet")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "images"


def _rounded(epochs: int, to: int) -> int:
    return max(1, epochs if epochs < to else round(epochs / to) * to)
