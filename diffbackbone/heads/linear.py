"""Linear head: average pooling and one linear layer (Section 4.1; Table 11)."""

from __future__ import annotations

from torch import Tensor, nn


class LinearHead(nn.Module):
    """The paper's linear probe, "GD" in its tables.

    With 1,024 channels and 1,000 classes, pools of 1, 2, 4 and 8 give 1k, 4k, 16k and 65k features
    and Table 11's 1, 4, 16 and 65M parameters.

    Args:
        in_channels: Channels of the map.
        num_classes: Number of classes.
        pool: Height and width after adaptive average pooling; the paper takes 2.
    """

    def __init__(self, in_channels: int, num_classes: int, pool: int = 2) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.linear = nn.Linear(in_channels * pool**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a map (N, C, H, W) of any height and width: logits (N, num_classes)."""
        return self.linear(self.pool(x.to(self.linear.weight.dtype)).flatten(1))
