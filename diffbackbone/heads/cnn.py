"""CNN head: average pooling and strided convolutions (Section 9.1, Table 12)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from diffbackbone.heads._checks import check_map, positive

_KERNEL = 2


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

    Weights start as torch's own layers start them.

    Args:
        in_channels: Channels of the map.
        num_classes: Number of classes.
        hidden: Output channels of each convolution; the default is Table 12's CNN-1k-1k-1k.
        pool: Height and width after adaptive average pooling; each convolution halves them.

    Raises:
        ValueError: A number is not a positive integer, there is no convolution, or ``pool``
            can't be halved by each.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden: Sequence[int] = (1000, 1000),
        pool: int = 8,
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels, num_classes=num_classes, pool=pool)
        hidden = tuple(hidden)
        if not hidden:
            raise ValueError("hidden needs the channels of at least one convolution")
        for channels in hidden:
            positive(hidden=channels)
        shrink = _KERNEL ** len(hidden)
        if pool % shrink:
            raise ValueError(
                f"pool must be a multiple of {shrink} for {len(hidden)} convolutions that each "
                f"halve the map, got {pool}"
            )
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.pool = pool
        self.convs = nn.Sequential()
        for fan_in, fan_out in zip((in_channels, *hidden), hidden):
            conv = nn.Conv2d(fan_in, fan_out, _KERNEL, stride=_KERNEL)
            self.convs.extend([conv, nn.ReLU(inplace=True)])
        self.linear = nn.Linear(hidden[-1] * (pool // shrink) ** 2, num_classes)

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
        x = self.convs(F.adaptive_avg_pool2d(x, self.pool))
        return self.linear(x.flatten(1))

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"pool={self.pool}"
