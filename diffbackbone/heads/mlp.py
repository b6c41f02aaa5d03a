"""MLP head: average pooling and a few linear layers with ReLU (Section 9.1, Table 11)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from diffbackbone.heads._checks import check_map, positive


class MLPHead(nn.Module):
    """A perceptron on pooled features, one of the alternatives to the attention head.

    The default is the best of Table 11, "MLP-16k-2k". The table's "k" is 1,000 in the hidden
    sizes, its counts are for 1,000 classes (the accuracies beside them are on 50) and drop the
    fraction: with 1,024 channels, 1k-2k is 4.05M, 4k-2k 10.2M, 4k-2k-2k 14.2M and 16k-2k 34.8M.
    With hidden sizes of 2,048 the last would be 35.6M, where the table prints 34M.

    Weights start as :class:`torch.nn.Linear` starts them, as in the published code.

    Args:
        in_channels: Channels of the map.
        num_classes: Number of classes.
        hidden: Widths of the hidden layers, at least one.
        pool: Height and width after adaptive average pooling.

    Raises:
        ValueError: A number is not a positive integer, or there is no hidden layer.
    """

    def __init__(
        self, in_channels: int, num_classes: int, hidden: Sequence[int] = (2000,), pool: int = 4
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels, num_classes=num_classes, pool=pool)
        hidden = tuple(hidden)
        if not hidden:
            raise ValueError("hidden needs at least one width; LinearHead has no hidden layer")
        for width in hidden:
            positive(hidden=width)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.pool = pool
        self.layers = nn.Sequential()
        for fan_in, fan_out in zip((in_channels * pool * pool, *hidden), hidden):
            self.layers.extend([nn.Linear(fan_in, fan_out), nn.ReLU(inplace=True)])
        self.layers.append(nn.Linear(hidden[-1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Classify a map.

        Args:
            x: Map (N, C, H, W) of any height and width.

        Returns:
            Logits (N, num_classes).

        Raises:
            ValueError: See :func:`~diffbackbone.heads._checks.check_map`.
        """
        x = check_map(x, self.in_channels, self.layers[0].weight.dtype)
        return self.layers(F.adaptive_avg_pool2d(x, self.pool).flatten(1))

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"pool={self.pool}"
