"""Linear head: average pooling and one linear layer (Section 4.1; Table 11)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from diffbackbone.heads._checks import check_map, positive


class LinearHead(nn.Module):
    """The paper's linear probe, "GD" in its tables.

    A map is pooled to ``pool`` x ``pool`` and flattened channel by channel. A map smaller than
    that is pooled up, which repeats its values: allowed, as in the published code, but of no use.

    With 1,024 channels and 1,000 classes, pools of 1, 2, 4 and 8 give 1k, 4k, 16k and 65k features
    and Table 11's 1, 4, 16 and 65M parameters. The table drops the fraction: the last is 65.5M.

    Weights start as :class:`torch.nn.Linear` starts them, as in the published code (the paper
    doesn't say).

    Args:
        in_channels: Channels of the map.
        num_classes: Number of classes.
        pool: Height and width after adaptive average pooling. The paper takes 2; the published
            code's option defaults to 16, but its linear script sets 2.

    Raises:
        ValueError: A number is not a positive integer.
    """

    def __init__(self, in_channels: int, num_classes: int, pool: int = 2) -> None:
        super().__init__()
        positive(in_channels=in_channels, num_classes=num_classes, pool=pool)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.pool = pool
        self.linear = nn.Linear(in_channels * pool * pool, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a map.

        Args:
            x: Map (N, C, H, W) of any height and width.

        Returns:
            Logits (N, num_classes).

        Raises:
            ValueError: See :func:`~diffbackbone.heads._checks.check_map`.
        """
        x = check_map(x, self.in_channels, self.linear.weight.dtype)
        return self.linear(F.adaptive_avg_pool2d(x, self.pool).flatten(1))

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"pool={self.pool}"
