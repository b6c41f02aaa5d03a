"""MLP head: average pooling and a few linear layers with ReLU (Section 9.1, Table 11)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class MLPHead(nn.Module):
    """A perceptron on pooled features, one of the alternatives to the attention head.

    The default is the best of Table 11, "MLP-16k-2k". The table's "k" is 1,000 in the hidden
    sizes, and its counts are for 1,000 classes: with 1,024 channels, 1k-2k is 4.05M, 4k-2k 10.2M,
    4k-2k-2k 14.2M and 16k-2k 34.8M. With hidden sizes of 2,048 the last would be 35.6M, where the
    table prints 34M.

    Args:
        in_channels: Channels of the map.
        num_classes: Number of classes.
        hidden: Widths of the hidden layers.
        pool: Height and width after adaptive average pooling.
    """

    def __init__(
        self, in_channels: int, num_classes: int, hidden: Sequence[int] = (2000,), pool: int = 4
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.layers = nn.Sequential()
        width = in_channels * pool**2
        for next_width in hidden:
            self.layers.extend([nn.Linear(width, next_width), nn.ReLU(inplace=True)])
            width = next_width
        self.layers.append(nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Classify a map (N, C, H, W) of any height and width: logits (N, num_classes)."""
        return self.layers(self.pool(x.to(self.layers[0].weight.dtype)).flatten(1))
