"""Recovery of thrown tokens from decoded neighbors without a decoder layer: PR-MIM's progressive step (arXiv 2411.15746).

The form of the aggregation and its 3 x 3 size are a choice of this project: the paper's code was not available.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bim.models.precision import autocast_disabled

# Side of the neighborhood. The module then costs about 1 MMAC at 14 x 14 x 512, within the FLOPs that the paper reports; a
# dense layer would not be.
KERNEL = 3


class NeighborAggregation(nn.Module):
    """The weighted mean of a token's decoded neighbors, channel by channel.

    f(p) = sum over offsets o of w(o) h(p + o) / sum of w(o), both over the decoded neighbors p + o; w > 0 is learned per
    channel and starts at 1.

    dim: width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The logarithm keeps weights positive and the divisor away from zero.
        self.log_weight = nn.Parameter(torch.zeros(dim, 1, KERNEL, KERNEL))

    def forward(
        self, decoded: Tensor, token_index: Tensor, thrown: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """decoded: (B, Np, dim), tokens that passed the layers. token_index: (B, Np), their indices on `grid` (rows,
        columns). thrown: (B, Nt), indices of the tokens to recover.

        -> (B, Nt, dim) float32, zero where no neighbor is decoded, and (B, Nt) bool, True where one is.
        """
        # In float32 under any autocast: the quotient of two half-precision sums is inexact.
        with autocast_disabled(decoded.device):
            batch, _, dim = decoded.shape
            rows, columns = grid
            weight = self.log_weight.float().exp()
            scattered = decoded.new_zeros(batch, dim, rows * columns, dtype=torch.float32).scatter(
                2, token_index.unsqueeze(1).expand(-1, dim, -1), decoded.float().transpose(1, 2)
            )
            sums = F.conv2d(scattered.unflatten(2, grid), weight, padding=KERNEL // 2, groups=dim)
            sums = sums.flatten(2)  # (B, dim, N)
            sums = sums.gather(2, thrown.unsqueeze(1).expand(-1, dim, -1)).transpose(1, 2)  # (B, Nt, dim)

            # Which of the 9 neighbors are decoded, once for all channels: (B, Nt, 9).
            is_decoded = decoded.new_zeros(batch, rows * columns, dtype=torch.float32)
            is_decoded.scatter_(1, token_index, 1.0)
            neighbors = F.unfold(is_decoded.view(batch, 1, rows, columns), KERNEL, padding=KERNEL // 2)
            neighbors = neighbors.gather(2, thrown.unsqueeze(1).expand(-1, KERNEL**2, -1)).transpose(1, 2)
            has_neighbor = neighbors.amax(dim=2) > 0
            divisor = neighbors @ weight.flatten(1).T  # (B, Nt, dim)
            return sums / divisor.where(has_neighbor.unsqueeze(-1), 1.0), has_neighbor
