"""guided-diffusion's classifiers: the encoder half of its U-Net, trained with labels (Table 1).

Key-for-key compatible with OpenAI's ``*_classifier.pt``. Reference: Dhariwal and Nichol, "Diffusion
Models Beat GANs on Image Synthesis", 2021.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbackbone.models.base import BlockTable
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.models.ops import Conv1x1, GroupNorm32


class EncoderTable(BlockTable):
    """The encoder and middle blocks of a U-Net, under their numbers there."""

    no_feedback = "a classifier has no decoder whose features could be fed back into the encoder"

    def mirror(self, index: int) -> int:
        """Return the block's mirror in the whole U-Net, which no run reaches."""
        return 2 * len(self) - index


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(UNetConfig):
    """Architecture of a guided-diffusion classifier.

    The fields are those of :class:`UNetConfig`, but ``model_channels`` is the classifier's width,
    ``num_res_blocks`` its depth and ``out_channels`` the number of classes that it tells apart.
    """

    model_channels: int = 128
    out_channels: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes is not None or self.num_head_channels is None:
            raise ValueError(
                "a classifier has num_head_channels, and no num_classes: it reads no labels, and "
                "tells out_channels classes apart"
            )

    @functools.cached_property
    def blocks(self) -> EncoderTable:
        """The table of blocks: encoder and middle; 19 for the 256-px classifier."""
        return EncoderTable(info for info in super().blocks.values() if info.part != "decoder")

    def build(self, pretrained: bool = False, **options: Any) -> EncoderUNet:
        """Build the network; see :func:`diffbackbone.models.build_network`."""
        return EncoderUNet(self, **options)


CLASSIFIERS: dict[str, ClassifierConfig] = {
    "gd64_classifier": ClassifierConfig(
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=4,
        attention_strides=(2, 4, 8),
        image_size=64,
        noise_schedule="cosine",  # of the model that it guides
    ),
    "gd128_classifier": ClassifierConfig(
        channel_mult=(1, 1, 2, 3, 4), attention_strides=(4, 8, 16), image_size=128
    ),
    "gd256_classifier": ClassifierConfig(),
    "gd512_classifier": ClassifierConfig(
        channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention_strides=(16, 32, 64), image_size=512
    ),
}
"""Configurations of OpenAI's released classifiers."""


class AttentionPool(nn.Module):
    """One attention query, the mean of all positions, pools a map into class scores."""

    def __init__(self, size: int, channels: int, head_channels: int, classes: int) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        positions = torch.randn(channels, size**2 + 1) / channels**0.5
        self.positional_embedding = nn.Parameter(positions)
        self.qkv_proj = Conv1x1(channels, 3 * channels)
        self.c_proj = Conv1x1(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, classes)."""
        x = x.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positional_embedding.to(x.dtype)
        qkv = self.qkv_proj(x).transpose(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()  # each (N, heads, positions, width)
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # (N, heads, 1, width)
        return self.c_proj(pooled.flatten(1, 3).unsqueeze(2)).squeeze(2)


class EncoderUNet(UNet):
    """guided-diffusion's classifier; its blocks have the numbers of the U-Net's first half.

    Args:
        config: Architecture.
        last_block: Build blocks 1 to this one (1-based) and no pooling; None builds all.
        **options: See :class:`UNet`.
    """

    config: ClassifierConfig
    anchor = "time_embed.0.weight"

    def __init__(
        self,
        config: ClassifierConfig,
        last_block: int | None = None,
        **options: Any,
    ) -> None:
        count, channels = len(config.blocks), config.widths[-1]
        super().__init__(config, count if last_block is None else last_block, **options)
        if last_block is None:
            size = config.image_size // config.blocks[count].stride
            pool = AttentionPool(size, channels, config.num_head_channels, config.out_channels)
            self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), pool)

    def forward(self, x_t: Tensor, t: Tensor | int | float, y: None = None) -> Tensor:
        """Return class scores (N, classes), before softmax.

        Args:
            x_t: Noised images (N, 3, H, W) of the classifier's size; clean images for t=0.
            t: Timesteps (N,) or (1,), 0-based, or one number.
            y: None.

        Raises:
            ValueError: The images are of another size.
        """
        size = self.config.image_size
        if tuple(x_t.shape[-2:]) != (size, size):
            raise ValueError(
                f"class scores need images of {size} x {size} px, got {tuple(x_t.shape[-2:])}"
            )
        state = self.start(x_t, t, len(self.blocks), y)
        self.traverse(state, len(self.blocks))
        norm, _, pool = self.out
        return pool(norm(state.h, silu=True)).to(x_t.dtype)

    @property
    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights of the architecture, also of those that were not built."""
        with torch.device("meta"):
            whole = EncoderUNet(self.config)
        return {name: tuple(value.shape) for name, value in whole.state_dict().items()}

    def convert(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a file's weights under this network's names, which are the file's."""
        return weights
