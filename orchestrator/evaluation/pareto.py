"""The Pareto front of quality against cost. A leaf."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points on the front, the cheapest first: no other point is at least as good in both and better in one.

    costs: lower is better. values: higher is better, one for each cost. Of equal points the first is on the front.
    """
    indices, best = [], -math.inf
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i], i)):
        if values[index] > best:
            indices.append(index)
            best = values[index]
    return indices
