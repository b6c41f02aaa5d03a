"""Heads on a pooled map: linear layer, perceptron, convolutions (Sections 4.1 and 9.1)."""

from __future__ import annotations

from collections.abc import Sequence

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


class CNNHead(nn.Module):
    """Strided convolutions on a pooled map, one of the alternatives to the attention head.

    Neither the paper nor the published code tells this head's layers; only the channels and the
    counts of Table 12 are known. This head is what fits the counts: 2x2 convolutions (of stride 2
    here) with ReLU, flattened at 2x2 positions into a linear layer of 1,000 classes, where "k" is
    1,000 in the hidden channels. That makes 2.3, 3.6, 6.1, 12.1, 14.3, 32.2 and 66.4M where the
    table prints 2.5, 3.5, 6, 12, 14, 32 and 66M. The row left over, CNN-1k-4k-2k, comes to 56.4M
    where 48M is printed. What stands between the layers leaves hardly a trace in the counts, so the
    table's accuracies need not carry over.

    Args:
        in_channels: Channels of the map.
        num_classes: Number of classes.
        hidden: Output channels of each convolution; the default is Table 12's CNN-1k-1k-1k.
        pool: Height and width after adaptive average pooling; each convolution halves them.

    Raises:
        ValueError: ``pool`` can't be halved by each convolution.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden: Sequence[int] = (1000, 1000),
        pool: int = 8,
    ) -> None:
        super().__init__()
        side, rest = divmod(pool, 2 ** len(hidden))
        if rest:
            raise ValueError(f"pool must be a multiple of {2 ** len(hidden)}, got {pool}")
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.convs = nn.Sequential()
        channels = in_channels
        for next_channels in hidden:
            conv = nn.Conv2d(channels, next_channels, 2, stride=2)
            self.convs.extend([conv, nn.ReLU(inplace=True)])
            channels = next_channels
        self.linear = nn.Linear(channels * side**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a map (N, C, H, W) of any height and width: logits (N, num_classes)."""
        x = self.convs(self.pool(x.to(self.linear.weight.dtype)))
        return self.linear(x.flatten(1))
