"""Recovery of thrown tokens from decoded neighbours, without a decoder layer (PR-MIM's progressive step, papers.md 2.3).

The form and the 3 x 3 size are this project's reading: the paper's own were not available (papers.md 2.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bim.models.precision import full_precision

# Side of the neighbourhood. With it the module costs about 1 MMAC at 14 x 14 x 512, which the paper's figures leave room
# for; a dense layer would be too much.
KERNEL = 3


class NeighbourAggregation(nn.Module):
    """The weighted mean of a token's decoded neighbours, channel by channel.

    f(p) = sum over offsets o of w(o) h(p + o) / sum of w(o), both over the neighbours p + o that are there; w > 0
    is learned per channel and begins as 1, so that nothing is drawn at random.

    dim: width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The logarithm: positive weights keep the divisor away from zero whatever the optimizer does.
        self.log_weight = nn.Parameter(torch.zeros(dim, 1, KERNEL, KERNEL))

    def forward(
        self, decoded: Tensor, places: Tensor, wanted: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """decoded: (B, Np, dim), tokens that went through the layers. places: (B, Np), where they are on `grid` (rows,
        columns). wanted: (B, Nt) places to recover.

        -> (B, Nt, dim) float32, zero where no neighbour is decoded, and (B, Nt) bool, True where one is.
        """
        # In float32 whatever the decoder's precision: the quotient of two half-precision sums loses its last bits.
        with full_precision(decoded.device):
            batch, _, dim = decoded.shape
            rows, columns = grid
            weight = self.log_weight.float().exp()
            scattered = decoded.new_zeros(batch, dim, rows * columns, dtype=torch.float32).scatter(
                2, places.unsqueeze(1).expand(-1, dim, -1), decoded.float().transpose(1, 2)
            )
            sums = F.conv2d(scattered.unflatten(2, grid), weight, padding=KERNEL // 2, groups=dim)
            sums = sums.flatten(2)  # (B, dim, N)
            sums = sums.gather(2, wanted.unsqueeze(1).expand(-1, dim, -1)).transpose(1, 2)  # (B, Nt, dim)

            # Which of the 9 neighbours are there, once for all channels: (B, Nt, 9).
            present = decoded.new_zeros(batch, rows * columns, dtype=torch.float32).scatter(1, places, 1.0)
            around = F.unfold(present.view(batch, 1, rows, columns), KERNEL, padding=KERNEL // 2)  # (B, 9, N)
            around = around.gather(2, wanted.unsqueeze(1).expand(-1, KERNEL**2, -1)).transpose(1, 2)
            has_neighbour = around.amax(dim=2) > 0
            divisor = around @ weight.flatten(1).T  # (B, Nt, dim)
            return sums / divisor.where(has_neighbour.unsqueeze(-1), 1.0), has_neighbour
