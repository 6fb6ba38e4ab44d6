"""Default candidates of a few settings: the values that a search tries where `search.space` gives none.

To add those of another setting: one function, and one line in `DEFAULT_CANDIDATES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bim.models.backbones.backbone import Backbone
from bim.models.masks.plan import visible_counts
from bim.models.masks.sampling import kept_count
from bim.orchestrator.config.schema import Settings
from bim.orchestrator.config.short_forms import ratios_by_block
from bim.orchestrator.config.transforms import settings_to_mapping

MASK_RATIOS = (0.5, 0.6, 0.75, 0.85, 0.9)
RAMPS = ((0.6, 0.75), (0.75, 0.9))
"""Mask ratios of the first and the last block, between which those of the others lie."""

THROW_RATIOS = (0.0, 0.25, 0.5)

MIN_MASK_UNITS = 9
"""Mask units of the smallest image that is tried: fewer leave no choice of visible ones."""

SIZE_STEPS = (((0.0, 0.5), (0.5, 1.0)), ((0.0, 0.75), (0.5, 1.0)), ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0)))
"""Growing image sizes: (from this fraction of the epochs on, fraction of the image size of the backbone)."""


def mask_ratios(settings: Settings, backbone: Backbone) -> list[Any]:
    """Ratios that leave each block at least two visible units, and two that rise from block to block."""
    units, blocks = backbone.grid[0] * backbone.grid[1], settings.num_blocks
    ramps = [list(ends) for ends in RAMPS if blocks > 1 and backbone.encode != "all"]
    return [ratio for ratio in (*MASK_RATIOS, *ramps) if min(_visible(units, ratio, blocks), default=0) >= 2]


def throw_ratios(settings: Settings, backbone: Backbone) -> list[Any]:
    """Ratios that leave tokens to decode at most of the mask ratios; only 0 where decoders add no mask tokens."""
    if backbone.encode == "all":
        return [0.0]
    units, blocks = backbone.grid[0] * backbone.grid[1], settings.num_blocks

    def fits(throw: float, ratio: Any) -> bool:
        try:
            return all(kept_count(units, visible, throw) > 0 for visible in _visible(units, ratio, blocks))
        except ValueError:
            return False

    ratios = _mask_values(settings, backbone)
    return [throw for throw in THROW_RATIOS if 2 * sum(fits(throw, ratio) for ratio in ratios) >= len(ratios)]


def resolutions(settings: Settings, backbone: Backbone) -> list[Any]:
    """Schedules that grow to the image size of the backbone and suit most mask ratios; null is that size throughout."""
    side, unit, blocks = backbone.image_size[0], backbone.mask_unit_px, settings.num_blocks
    if backbone.image_size != (side, side):  # a schedule names one number of pixels
        return [None]
    ratios = _mask_values(settings, backbone)
    targets = zip(settings.per_block("target.name"), settings.per_block("target.cell"), strict=True)
    cells = {cell for name, cell in targets if name == "hog"}

    def fits(pixels: int) -> bool:
        if any(pixels % cell for cell in cells):
            return False
        try:
            backbone.check_size((pixels, pixels))
            rows, columns = backbone.grid_at((pixels, pixels))
        except ValueError:
            return False
        if rows * columns < MIN_MASK_UNITS:
            return False
        return 2 * sum(bool(_visible(rows * columns, ratio, blocks)) for ratio in ratios) >= len(ratios)

    schedules: list[Any] = [None]
    for steps in SIZE_STEPS:
        schedule = [
            (int(start) if start == 0 else start, unit * round(part * side / unit)) for start, part in steps
        ]
        sizes = [pixels for _, pixels in schedule]
        if len(set(sizes)) == len(sizes) and all(fits(pixels) for pixels in sizes):
            schedules.append([list(step) for step in schedule])
    return schedules


DEFAULT_CANDIDATES: dict[str, Callable[[Settings, Backbone], list[Any]]] = {
    "mask.ratio": mask_ratios,
    "decoder.throw_ratio": throw_ratios,
    "schedule.resolution": resolutions,
}
"""Setting -> its default candidates."""


def value_of(settings: Settings, key: str) -> Any:
    """The value of one setting, by its dotted key, as a plain value."""
    value: Any = settings_to_mapping(settings)
    for part in key.split(".", 2):
        value = value[part]
    return value


def _mask_values(settings: Settings, backbone: Backbone) -> Sequence[Any]:
    """The mask ratios that a search would combine with another setting."""
    entry = settings.search.space.get("mask.ratio", [value_of(settings, "mask.ratio")])
    return entry if isinstance(entry, list) and entry else mask_ratios(settings, backbone)


def _visible(units: int, ratio: Any, blocks: int) -> tuple[int, ...]:
    """Visible units of every block; () if a ratio leaves a block none, or nothing to predict."""
    try:
        return visible_counts(units, ratios_by_block(ratio, blocks))
    except (ValueError, TypeError):
        return ()
