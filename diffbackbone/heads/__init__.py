"""Classification heads on the maps of a backbone (Sections 3.1, 3.2, 9.1 of the paper).

They need torch alone and know no backbone: a head takes a map (N, C, H, W), ``DifFormerHead``
several, from :class:`~diffbackbone.DiffusionBackbone` or anything else, and returns logits
(N, num_classes). Maps are converted to the type of the head's weights.

Where paper and published code differ, or the paper is silent:

* **Initial values**: not in the paper. As in the code, torch's own for every layer, and zero for
  the CLS token.
* **Attention details**: not in the paper. As in the code: layer norm over the whole map
  (C, n, n) with a weight for each element, q, k, v without bias, CLS token first, exact GELU, eps
  1e-5, no position embedding, no norm after the last block, no dropout. Options that none of its
  scripts uses (batch norm, mean of the tokens, dense layers) are off.
* **Pooling**: text and code never pool a map up to 16x16; only DifFormer's count in Table 15 does.
  Text and code are followed. ``LinearHead`` and ``MLPHead`` pool to any size, as in the code.
* **Linear probe**: 2x2 pooling in the text and in the code's script; its option defaults to 16.
* **CNN head**: no code is published; ``CNNHead`` is what Table 12's counts tell.
* **Counts**: those of Tables 11 to 13 are for 1,000 classes although the accuracies are on 50, and
  Table 11 drops fractions. In Table 8 GD's 553M is the U-Net without a head (its linear probe
  would make it 557M); DifFormer's 585M and DifFeed's 583M include heads of 1,000 classes.

The published code's trained weights load through :func:`convert_published_head`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from diffbackbone.heads.attention import AttentionHead
from diffbackbone.heads.difformer import DifFormerHead
from diffbackbone.heads.pooled import CNNHead, LinearHead, MLPHead
from diffbackbone.heads.published import (
    convert_published_feedback,
    convert_published_head,
    published_options,
)

HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearHead,
    "mlp": MLPHead,
    "cnn": CNNHead,
    "attention": AttentionHead,
    "difformer": DifFormerHead,
}
"""The heads by the name that a command line gives them."""


def build_head(name: str, *args: Any, **options: Any) -> nn.Module:
    """Build a head by its name in :data:`HEADS` from the arguments of its class.

    Raises:
        ValueError: Unknown head or value.
        TypeError: Unknown option.
    """
    if name not in HEADS:
        raise ValueError(f"unknown head {name!r}; choose from {', '.join(HEADS)}")
    return HEADS[name](*args, **options)


__all__ = [
    "HEADS",
    "AttentionHead",
    "CNNHead",
    "DifFormerHead",
    "LinearHead",
    "MLPHead",
    "build_head",
    "convert_published_feedback",
    "convert_published_head",
    "published_options",
]
