"""CNN head: average pooling and strided convolutions (Section 9.1, Table 12)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class CNNHead(nn.Module):
    """Convolutions on a pooled map, one of the alternatives to the attention head.

    Neither the paper nor the published code tells this head's layers; only the channels and the
    counts of Table 12 are known. This head is what fits the counts: 2x2 convolutions (of stride 2
    here) with ReLU, flattened at 2x2 positions into a linear layer of 1,000 classes, where "k" is
    1,000 in the hidden channels. That makes 2.3, 3.6, 6.1, 12.1, 14.3, 32.2 and 66.4M where the
    table prints 2.5, 3.5, 6, 12, 14, 32 and 66M. The row left over, CNN-1k-4k-2k, comes to 56.4M
    where 48M is printed; no other kernel, number of positions or 50 classes fits the table as
    well. What stands between the layers leaves hardly a trace in the counts, so the table's
    accuracies need not carry over.

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
