"""What a process needs to open the same data as every other one: plain values that travel to actors."""

from __future__ import annotations

from dataclasses import dataclass, field

from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.loader import TrainBatches
from bim.orchestrator.data.phases import PhaseSpec
from bim.orchestrator.data.source import Source, open_source
from bim.orchestrator.data.splits import Splits, make_splits
from bim.orchestrator.plugins import import_plugins

CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a training crop, as in MAE and torchvision


@dataclass(frozen=True)
class DataSpec:
    """A source, its split and its augmentation; opening it twice gives the same images in the same order.

    Args:
        phases: sizes of crops and batches, by epoch.
        workers: worker processes of the training batches.
        crop_scale: range of the crop's fraction of the image area.
        split_seed: of the split into train, val and test, apart from `seed` so that runs with other seeds share it.
        seed: of permutation and augmentation.
        fingerprint: that `open` checks; None accepts any.
        plugins: modules that register what `source` names, see `bim.orchestrator.plugins`.
        given: the source itself, of a data set that is an object; it travels with the spec.
    """

    source: str
    phases: tuple[PhaseSpec, ...]
    image_column: str | None = None
    label_column: str | None = None
    workers: int = 0
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    seed: int = 0
    fingerprint: str | None = None
    plugins: tuple[str, ...] = ()
    given: Source | None = field(default=None, compare=False, repr=False)

    def open(self) -> tuple[Source, Splits]:
        """The source and its split. Raises DataError with one sentence when it cannot be read, or a PluginError."""
        import_plugins(self.plugins)
        source = self.given
        if source is None:
            source = open_source(self.source, self.image_column, self.label_column)
        if self.fingerprint is not None and source.fingerprint() != self.fingerprint:
            raise DataError(
                f"the images of {self.source} have changed since this run began (their number, their names or the sizes of "
                "their files), so its splits would no longer be the same; restore them, or start a new run"
            )
        return source, make_splits(source, self.split_seed, self.val_fraction, self.test_fraction)

    def train_batches(self) -> TrainBatches:
        """Open the data and return its training batches, indexed by step."""
        return self.batches_of(*self.open())

    def batches_of(self, source: Source, splits: Splits) -> TrainBatches:
        """The training batches of images that are open already."""
        return TrainBatches(
            source,
            splits.train,
            self.phases,
            crop_scale=self.crop_scale,
            crop_ratio=CROP_RATIO,
            flip=self.flip,
            seed=self.seed,
            workers=self.workers,
        )
