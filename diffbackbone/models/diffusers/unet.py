"""U-Nets of diffusers, run block by block: DDPM, ADM, Stable Diffusion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from diffbackbone.models.base import BlockInfo, BlockTable
from diffbackbone.models.diffusers.model import Condition, DiffusersModel, vae_stride

UNET_BLOCKS = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "CrossAttnDownBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "UNetMidBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2DSimpleCrossAttn",
    "UpBlock2D",
    "AttnUpBlock2D",
    "ResnetUpsampleBlock2D",
    "CrossAttnUpBlock2D",
    "SimpleCrossAttnUpBlock2D",
)
"""Kinds of levels that are supported: one skip for each residual block and downsampler."""


class Block(nn.Module):
    """Layers of one block of a U-Net, in the order in which they run.

    ``crosses``: attention layers read the text tokens. ``centers``: the input is mapped from [0, 1]
    to [-1, 1] first (``center_input_sample``).
    """

    def __init__(
        self, layers: list[nn.Module], crosses: bool = False, centers: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.crosses = crosses
        self.centers = centers

    def forward(self, h: Tensor, cond: Condition) -> Tensor:
        """(N, C_in, H, W) and a condition to (N, C, H', W')."""
        h = 2 * h - 1 if self.centers else h
        tokens = cond.tokens.expand(len(h), -1, -1) if self.crosses else None
        for layer in self.layers:
            if isinstance(layer, ResnetBlock2D):
                h = layer(h, cond.emb)
            elif isinstance(layer, Transformer2DModel):
                h = layer(h, encoder_hidden_states=tokens, return_dict=False)[0]
            elif isinstance(layer, Attention):
                h = layer(h, encoder_hidden_states=tokens)
            else:
                h = layer(h)
        return h


class DiffusersUNet(DiffusersModel):
    """``UNet2DModel`` and ``UNet2DConditionModel``.

    Blocks are numbered as in guided-diffusion: ``conv_in``, each residual block of the encoder with
    its attention, each downsampler, the middle, and each residual block of the decoder, the last of
    a level with its upsampler. Stable Diffusion 1.5 has 25.

    Args:
        net: See :class:`DiffusersModel`.
        vae: See :class:`DiffusersModel`.
        tokens: Text tokens (1, L, C) that cross-attention reads, where there is cross-attention.
        pooled: Pooled text embedding (1, C) where the network reads one (SDXL).
        learned: Train the tokens.
        **options: See :class:`DiffusionModel`.

    Raises:
        ValueError: The network has levels of another kind than :data:`UNET_BLOCKS`, or reads
            embeddings of images.
    """

    anchor = "time_embedding.linear_1.weight"

    def __init__(
        self,
        net: UNet2DModel | UNet2DConditionModel,
        vae: nn.Module | None = None,
        tokens: Tensor | None = None,
        pooled: Tensor | None = None,
        learned: bool = False,
        **options: Any,
    ) -> None:
        _check_supported(net)
        infos, modules = zip(*_unet_blocks(net, 1 if vae is None else vae_stride(vae)))
        super().__init__(net, vae, BlockTable(infos), list(modules), **options)
        if net.config.class_embed_type is None:
            self.num_classes = net.config.num_class_embeds
        for name in ("conv_norm_out", "conv_act", "conv_out", "position_net"):
            if hasattr(net, name):
                delattr(net, name)
        net.time_embedding.cond_proj = None  # of guidance scales, which features have none of
        self.learned = ("tokens",) if learned else ()
        self.tokens: Tensor | None
        self.pooled: Tensor | None
        self.register_buffer("pooled", pooled)
        if learned:
            self.tokens = nn.Parameter(tokens)
        else:
            self.register_buffer("tokens", tokens)

    @property
    def takes_labels(self) -> bool:
        """Whether the network has a class embedding."""
        return self.net.class_embedding is not None

    def idle_modules(self, labeled: bool) -> Iterator[nn.Module]:
        """Yield modules that a run without labels doesn't use."""
        if self.takes_labels and not labeled:
            yield self.net.class_embedding

    def embed(
        self,
        t: Tensor | int | float,
        y: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Condition:
        """Return the embeddings of timestep, labels and text that the blocks read."""
        net, dtype = self.net, self.weights_dtype
        t = torch.as_tensor(t, device=device).reshape(-1)
        emb = net.time_embedding(net.time_proj(t).to(dtype))
        if y is not None:
            if net.config.class_embed_type == "timestep":
                y = net.time_proj(y)
            if y.is_floating_point():
                y = y.to(dtype)
            label = net.class_embedding(y).to(dtype)
        if isinstance(net, UNet2DModel):
            return Condition(emb if y is None else emb + label)
        if net.config.class_embeddings_concat:
            label = torch.zeros_like(emb) if y is None else label
            emb = torch.cat([emb.expand(len(label), -1), label], dim=-1)
        elif y is not None:
            emb = emb + label
        tokens = None if self.tokens is None else self.tokens.to(dtype)
        added = self._added(dtype)
        extra = net.get_aug_embed(emb, tokens, added)
        emb = emb if extra is None else emb + extra
        if net.time_embed_act is not None:
            emb = net.time_embed_act(emb)
        return Condition(emb, net.process_encoder_hidden_states(tokens, added))

    def _added(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return SDXL's pooled text and sizes: those that the network was trained at, no crop."""
        if self.pooled is None:
            return {}
        config = self.net.config
        numbers = config.projection_class_embeddings_input_dim - self.pooled.shape[-1]
        size = self.net.sample_size or 128
        side = (size if isinstance(size, int) else min(size)) * self.input_stride
        sizes = [side, side, 0, 0, side, side]
        if numbers // config.addition_time_embed_dim == 5:  # SDXL's refiner: an aesthetic score
            sizes[4:] = [6]
        return {
            "text_embeds": self.pooled.to(dtype),
            "time_ids": torch.tensor([sizes], dtype=torch.float32, device=self.pooled.device),
        }


def _check_supported(net: nn.Module) -> None:
    levels = [*net.down_blocks, *net.up_blocks]
    if net.mid_block is not None:
        levels.append(net.mid_block)
    found = [type(level).__name__ for level in levels]
    found = [name for name in found if name not in UNET_BLOCKS]
    if net.config.get("dual_cross_attention"):
        found.append("dual_cross_attention")
    for name in ("encoder_hid_dim_type", "addition_embed_type"):
        kind = net.config.get(name)
        if kind is not None and "image" in kind:
            found.append(f"{name} {kind!r}")
    if found:
        raise ValueError(
            f"U-Nets with {', '.join(found)} are not supported; levels may be "
            f"{', '.join(UNET_BLOCKS)}"
        )


def _unet_blocks(net: nn.Module, stride: int) -> Iterator[tuple[BlockInfo, Block]]:
    """Yield the blocks of a U-Net whose input has the given stride."""
    index, channels = 0, net.conv_in.in_channels

    def block(
        part: str,
        name: str,
        layers: list[nn.Module],
        level: nn.Module | None = None,
        resample: str | None = None,
    ) -> tuple[BlockInfo, Block]:
        nonlocal index, channels, stride
        index += 1
        stride = {"down": 2 * stride, "up": stride // 2, None: stride}[resample]
        read = getattr(layers[0], "in_channels", channels)
        convs = [x for x in layers if hasattr(x, "out_channels")]  # all but attention
        channels = convs[-1].out_channels
        attention = any(isinstance(x, (Attention, Transformer2DModel)) for x in layers)
        info = BlockInfo(
            index, channels, stride, name, read, attention, resample=resample, part=part
        )
        crosses = getattr(level, "has_cross_attention", False)
        return info, Block(layers, crosses, index == 1 and net.config.center_input_sample)

    def residual(level: nn.Module, i: int) -> list[nn.Module]:
        attentions = getattr(level, "attentions", None)
        return [level.resnets[i], attentions[i]] if attentions else [level.resnets[i]]

    yield block("encoder", "conv_in", [net.conv_in])
    for n, level in enumerate(net.down_blocks):
        for i in range(len(level.resnets)):
            yield block("encoder", f"down_blocks.{n}.resnets.{i}", residual(level, i), level)
        if level.downsamplers is not None:
            name = f"down_blocks.{n}.downsamplers.0"
            yield block("encoder", name, list(level.downsamplers), resample="down")
    if net.mid_block is not None:
        level = net.mid_block
        layers = [level.resnets[0]]
        for attention, resnet in zip(level.attentions, level.resnets[1:]):
            layers += [resnet] if attention is None else [attention, resnet]
        yield block("middle", "mid_block", layers, level)
    for n, level in enumerate(net.up_blocks):
        for i in range(len(level.resnets)):
            layers, resample = residual(level, i), None
            if i == len(level.resnets) - 1 and level.upsamplers is not None:
                layers, resample = [*layers, *level.upsamplers], "up"
            yield block("decoder", f"up_blocks.{n}.resnets.{i}", layers, level, resample)
