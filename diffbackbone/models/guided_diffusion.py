"""The guided-diffusion U-Net ("ADM"), key-for-key compatible with OpenAI's image models.

Reference: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbackbone.models.base import BlockInfo, DiffusionModel
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.ops import Conv1x1, Conv3x3, GroupNorm32, recomputed


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Return the sinusoidal embedding (N, dim) of timesteps (N,), cosines first, in float32."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Residual block with a time embedding, which may resample by a factor of two."""

    def __init__(
        self, config: UNetConfig, in_channels: int, channels: int, resample: str | None = None
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = config.use_scale_shift_norm
        self.resample = resample
        self.in_layers = nn.Sequential(
            GroupNorm32(in_channels),
            nn.SiLU(),
            Conv3x3(in_channels, channels),
        )
        emb_out = 2 * channels if config.use_scale_shift_norm else channels
        emb_layer = nn.Linear(4 * config.model_channels, emb_out)
        self.emb_layers = nn.Sequential(nn.SiLU(), emb_layer)
        self.out_layers = nn.Sequential(
            GroupNorm32(channels),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            _zero(Conv3x3(channels, channels)),
        )
        self.skip_connection = (
            nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, C_in, H, W) and a time embedding (N or 1, E) to (N, C, H', W')."""
        conv = self.in_layers[2]
        h = conv(recomputed(self._before_conv, x), upsample=self.resample == "up")
        emb_out = self.emb_layers(emb).to(h.dtype)
        dropout, conv = self.out_layers[2:]
        h = recomputed(self._between_convs, h, emb_out)  # what was h before can be freed now
        h = conv(dropout(h))
        if self.resample:
            x = _resample(x, self.resample)
        return h.add_(self.skip_connection(x))

    def _before_conv(self, x: Tensor) -> Tensor:
        h = self.in_layers[0](x, silu=True)
        return _resample(h, "down") if self.resample == "down" else h

    def _between_convs(self, h: Tensor, emb_out: Tensor) -> Tensor:
        norm = self.out_layers[0]
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            return norm(h, scale, shift, silu=True, reuse=True)
        return norm(h + emb_out[..., None, None], silu=True, reuse=True)


def _resample(x: Tensor, how: str) -> Tensor:
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """(N, C, H, W) to (N, C, H/2, W/2) by a strided convolution or by pooling."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Resample; the embedding is not used."""
        return self.op(x)


class Upsample(nn.Module):
    """(N, C, H, W) to (N, C, 2H, 2W) by nearest neighbors, then an optional convolution."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Resample; the embedding is not used."""
        if isinstance(self.conv, Conv3x3):
            return self.conv(x, upsample=True)
        return _resample(x, "up")


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with a residual connection.

    q, k and v keep their last dimension contiguous: only then does torch take a kernel whose memory
    is linear in the number of positions.
    """

    def __init__(self, channels: int, num_heads: int, new_order: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.new_order = new_order
        self.norm = GroupNorm32(channels)
        self.qkv = Conv1x1(channels, 3 * channels)
        self.proj_out = _zero(Conv1x1(channels, channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape; the embedding is not used."""
        n, c, height, width = x.shape
        qkv = self.qkv(recomputed(self.norm, x).flatten(2)).transpose(1, 2).contiguous()
        if self.new_order:
            q, k, v = qkv.view(n, height * width, 3, self.num_heads, -1).unbind(2)
        else:
            q, k, v = qkv.view(n, height * width, self.num_heads, 3, -1).unbind(3)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        out = out.transpose(1, 2).reshape(n, height * width, c)
        return x + self.proj_out(out.transpose(1, 2)).reshape(n, c, height, width)


def _zero(module: nn.Module) -> nn.Module:
    """Zero the last layer of a residual branch, as guided-diffusion does."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Block(nn.Sequential):
    """Layers of one block, run in order with the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, C_in, H, W) and an embedding (N or 1, E) to (N, C, H', W')."""
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
        return x


class UNet(DiffusionModel):
    """guided-diffusion's U-Net, built as far as its last block that is asked for.

    Args:
        config: Architecture.
        last_block: Build blocks 1 to this one (1-based) and no output layer; None builds all.
        activation_checkpointing: See :class:`DiffusionModel`, as for the budget.
        activation_budget: GB of activations that a run may keep for the backward pass.

    Raises:
        ValueError: ``last_block`` is not a block number, or the budget is negative.
    """

    def __init__(
        self,
        config: UNetConfig,
        last_block: int | None = None,
        activation_checkpointing: bool = False,
        activation_budget: float | None = None,
    ) -> None:
        super().__init__(config.blocks, last_block, activation_checkpointing, activation_budget)
        self.config = config
        self.in_channels = config.in_channels
        self.num_classes = config.num_classes
        self.noise_schedule = config.noise_schedule
        emb_channels = 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb_channels)
        self.input_blocks = nn.ModuleList()
        self.output_blocks = nn.ModuleList()
        for index in range(1, self.last_block + 1):
            info = self.blocks[index]
            block = Block(*self._layers(info))
            if info.part == "middle":
                self.middle_block = block
            else:
                (self.input_blocks if info.part == "encoder" else self.output_blocks).append(block)
        if last_block is None:
            self.out = nn.Sequential(
                GroupNorm32(config.widths[0]),
                nn.SiLU(),
                _zero(Conv3x3(config.widths[0], config.out_channels)),
            )

    def _layers(self, info: BlockInfo) -> Iterator[nn.Module]:
        """Yield the layers of one block, in guided-diffusion's order."""
        config, channels = self.config, info.channels
        if info.index == 1:
            yield Conv3x3(info.in_channels, channels)
            return
        if info.resample != "down":
            yield ResBlock(config, info.in_channels, channels)
        if info.attention:
            heads = config.heads(channels, info.part == "decoder")
            yield AttentionBlock(channels, heads, config.use_new_attention_order)
        if info.part == "middle":
            yield ResBlock(config, channels, channels)
        if info.resample and config.resblock_updown:
            yield ResBlock(config, channels, channels, info.resample)
        elif info.resample:
            kind = Downsample if info.resample == "down" else Upsample
            yield kind(channels, config.conv_resample)

    def embed(
        self,
        t: Tensor | int | float,
        y: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Return the time (and class) embedding (N, E), or (1, E) for a single timestep."""
        if not isinstance(t, Tensor):
            t = torch.full((1,), float(t), device=device)
        weight = self.time_embed[0].weight
        emb = timestep_embedding(t.reshape(-1), self.config.model_channels).to(weight.dtype)
        emb = self.time_embed(emb)
        return emb if y is None else emb + self.label_emb(y)

    def forward(self, x_t: Tensor, t: Tensor | int | float, y: Tensor | None = None) -> Tensor:
        """Return the model's own output: noise (N, 3, H, W), or noise and variance (N, 6, H, W).

        Args:
            x_t: Noised images (N, C, H, W); H and W multiples of the deepest stride.
            t: Timesteps (N,) or (1,), 0-based, or one number.
            y: Class labels (N,), for a class-conditional model.

        Raises:
            ValueError: The U-Net was built without its last blocks, or the size or labels don't
                fit.
        """
        state = self.start(x_t, t, len(self.blocks), y)
        self.traverse(state, len(self.blocks))
        norm, _, conv = self.out
        return conv(norm(state.h, silu=True)).to(x_t.dtype)
