"""Attention head: tokens of one map and a CLS token through a small transformer (Section 3.1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffbackbone.heads.transformer import Tokenizer, Transformer


class AttentionHead(nn.Module):
    """The paper's learnable pooling of one map; DifFeed ends in it too (Section 3.3).

    On block b=24 of the 256-px model at 256 px (1,024 channels, 16x16) with 1,000 classes, 1, 2
    and 4 layers make 15.2, 27.8 and 53.0M parameters (Table 2); 2 layers with 50 classes make
    26.8M (Table 15). Table 13's counts (13.7 to 64.0M for 1 to 5 layers, "without 1x1
    convolution") come out with ``proj=False, pool=4`` and, again, 1,000 classes.

    Args:
        in_channels: Channels of the map.
        num_classes: Number of classes.
        size: Height and width of the map, or one number for both: ceil(image size / stride).
        pool: Maps higher or wider than this are pooled to it.
        width: Channels of the tokens.
        proj: Have the tokenizer's 1x1 convolution; without it the width is ``in_channels``.
        norm: Norm of the tokenizer: ``"layer"``, over the whole map; ``"batch"``; or ``"none"``.
        **options: ``layers``, ``num_heads``, ``mlp_ratio``, ``readout``, ``cls_token`` and
            ``dense`` of :class:`~diffbackbone.heads.transformer.Transformer`.

    Raises:
        ValueError: The heads don't divide the width, or an unknown readout.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        size: int | tuple[int, int],
        pool: int = 16,
        width: int = 1024,
        proj: bool = True,
        norm: str = "layer",
        **options: Any,
    ) -> None:
        super().__init__()
        if not proj:
            width = in_channels
        self.tokenizer = Tokenizer(in_channels, size, width, pool, proj, norm)
        self.transformer = Transformer(width, **options)
        self.linear = nn.Linear(self.transformer.out_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a map (N, C, H, W) that gives the same grid of tokens as ``size``.

        Returns:
            Logits (N, num_classes).
        """
        return self.linear(self.transformer(self.tokenizer(x)))
