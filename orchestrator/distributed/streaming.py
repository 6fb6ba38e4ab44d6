"""Results of a remote generator, one at a time: files of any total size come back from a node without shared storage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bim.orchestrator.distributed.cluster import died, raise_if_cluster_lost, task_result
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.training.errors import ClusterLostError

Item = TypeVar("Item")

ITEMS_AHEAD = 2
"""Items that the generator may produce before they are taken; each lies in the object store meanwhile."""

RETRIES = 2
"""How often a generator whose process dies is started again."""

log = logging.getLogger(__name__)


def stream_from_bundle(
    function: Callable[..., Iterator[Item]],
    placement_group: PlacementGroup,
    layout: StageLayout,
    should_cancel: Callable[[], bool],
    *args: object,
) -> Iterator[Item]:
    """Run the generator `function(*args)` in its own process in the bundle of the first stage, whose actors have ended.

    Yields its items; ends early once `should_cancel()`. A generator whose process dies is started again, and all of its
    items come again. (Ray's own retry leaves out as many items as were taken, which need not be the same ones.)

    Raises:
        Exception: what the generator raises.
        TrainingError: its process died once too often.
    """
    for retries_left in reversed(range(RETRIES + 1)):
        try:
            yield from _stream(function, placement_group, layout, should_cancel, *args)
            return
        except RayError as error:
            if isinstance(error, RayTaskError):
                raise
            if not retries_left:
                raise died(error) from error
            log.debug("a process that sends results died and is started again: %s", error)


def _stream(
    function: Callable[..., Iterator[Item]],
    placement_group: PlacementGroup,
    layout: StageLayout,
    should_cancel: Callable[[], bool],
    *args: object,
) -> Iterator[Item]:
    bundle = PlacementGroupSchedulingStrategy(placement_group, placement_group_bundle_index=0)
    items = (
        ray.remote(function)
        .options(
            scheduling_strategy=bundle,
            num_cpus=layout.cpus,
            num_gpus=min(1.0, layout.gpus),
            max_retries=0,
            num_returns="streaming",
            _generator_backpressure_num_objects=ITEMS_AHEAD,
        )
        .remote(*args)
    )
    while True:
        try:
            while not ray.wait([items], timeout=0.5, fetch_local=False)[0]:
                raise_if_cluster_lost()
                if should_cancel():
                    ray.cancel(items, force=True)
                    return
        except ClusterLostError:
            raise  # nobody is there to cancel it
        except Exception:
            ray.cancel(items, force=True)
            raise
        try:
            reference = next(items)
        except StopIteration:
            return
        yield task_result(reference)
