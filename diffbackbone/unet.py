"""The guided-diffusion U-Net ("ADM"): configuration, block table and one traversal for every use.

State dicts are key-for-key compatible with OpenAI's guided-diffusion image models. The network is
described once, by the table :attr:`UNetConfig.blocks`; everything else (construction, taps, which
skip a decoder block reads, where features stop) is derived from it.

Reference: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from reprlib import repr as shorten
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from diffbackbone.ops import (
    GROUPS,
    Conv1x1,
    Conv3x3,
    GroupNorm32,
    autocasts,
    is_readable,
    layout,
    recomputed,
)


@dataclasses.dataclass(frozen=True)
class BlockInfo:
    """What one block of a U-Net puts out.

    Attributes:
        index: 1-based block number b, counted over encoder, middle and decoder.
        channels: Channels of the block's output.
        stride: Stride of the output relative to the input image.
        name: Name of the module, as in the state dict (``output_blocks.4``).
        in_channels: Channels that the block reads, the concatenated skip included.
        attention: Whether self-attention follows the block's residual layer.
        resample: ``"down"``, ``"up"`` or None.
    """

    index: int
    channels: int
    stride: int
    name: str = dataclasses.field(default="", repr=False, compare=False)
    in_channels: int = dataclasses.field(default=0, repr=False, compare=False)
    attention: bool = dataclasses.field(default=False, repr=False, compare=False)
    resample: str | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of a guided-diffusion U-Net.

    Attributes:
        model_channels: Base width; level l is ``int(channel_mult[l] * model_channels)`` wide.
        channel_mult: Width multiplier for each level; fractions are allowed (0.5 in the 512 model).
        num_res_blocks: Residual blocks for each level of the encoder (the decoder has one more).
        attention_strides: Strides at which attention follows every residual block. This is
            ``image_size / resolution`` for each of guided-diffusion's ``attention_resolutions``.
        in_channels: Channels of the image.
        out_channels: 3 for noise alone, 6 with a learned variance.
        num_head_channels: Width of an attention head; None to give ``num_heads`` instead.
        num_heads: Attention heads, where ``num_head_channels`` is None.
        num_heads_upsample: Attention heads of the decoder; None for the same as ``num_heads``.
        use_scale_shift_norm: The time embedding scales and shifts the second norm; otherwise it is
            added before it.
        resblock_updown: Residual blocks resample; otherwise a convolution or pooling does.
        conv_resample: Without ``resblock_updown``: resample by a learned 3x3 convolution.
        use_new_attention_order: q, k, v are split before the heads; otherwise (legacy) after.
        num_classes: Classes of a class-conditional model; None for an unconditional one.
        dropout: Dropout rate of the residual blocks.
        image_size: Resolution in pixels that the weights were trained at.
        noise_schedule: Schedule that the weights were trained with, ``"linear"`` or ``"cosine"``.

    Raises:
        ValueError: A value is not allowed; the message says which and what is.
    """

    model_channels: int = 256
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    num_res_blocks: int = 2
    attention_strides: tuple[int, ...] = (8, 16, 32)
    in_channels: int = 3
    out_channels: int = 6
    num_head_channels: int | None = 64
    num_heads: int = 1
    num_heads_upsample: int | None = None
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    conv_resample: bool = True
    use_new_attention_order: bool = False
    num_classes: int | None = None
    dropout: float = 0.0
    image_size: int = 256
    noise_schedule: str = "linear"

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_strides"):
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise ValueError(f"{name} must be a list of numbers, got {shorten(given)}")
            object.__setattr__(self, name, tuple(given))
        for name in ("num_head_channels", "num_heads_upsample"):  # guided-diffusion writes -1
            if getattr(self, name) == -1:
                object.__setattr__(self, name, None)
        _check_fields(self)
        for level, width in enumerate(self.widths):
            if width < GROUPS or width % GROUPS:
                raise ValueError(
                    f"level {level} is {width} channels wide (model_channels="
                    f"{self.model_channels} x {self.channel_mult[level]}); group norm needs a "
                    f"positive multiple of {GROUPS}"
                )
            attended = level == len(self.widths) - 1 or 2**level in self.attention_strides
            heads = self.num_head_channels or self.num_heads
            if attended and width % heads:
                name = "num_head_channels" if self.num_head_channels else "num_heads"
                raise ValueError(
                    f"{name}={heads} does not divide the {width} channels of level {level}"
                )
        strides = [2**level for level in range(len(self.channel_mult))]
        if unknown := set(self.attention_strides) - set(strides):
            raise ValueError(
                f"attention_strides {sorted(unknown)} don't occur; choose from {strides}"
            )
        if self.noise_schedule not in ("linear", "cosine"):
            raise ValueError(
                f"noise_schedule must be 'linear' or 'cosine', got {shorten(self.noise_schedule)}"
            )

    @classmethod
    def from_preset(cls, name: str) -> UNetConfig:
        """The configuration of a released model, or of ``tiny``.

        ``tiny`` has the same 37 blocks, strides and feedback strategies as the 256-px models at an
        eighth of the width and less, so block numbers carry over.

        Args:
            name: One of :data:`PRESETS`.

        Raises:
            ValueError: Unknown preset; the message lists the known ones.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset {shorten(name)}; choose from {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        num_head_channels: int | None = 64,
        **rest: Any,
    ) -> UNetConfig:
        """Read the architecture off the shapes of a guided-diffusion state dict.

        What shapes can't tell is asked for: the attention heads (``num_head_channels``, or
        ``num_heads`` with ``num_head_channels=None``), ``use_new_attention_order``, ``dropout``,
        ``image_size`` and ``noise_schedule``.

        Args:
            state_dict: guided-diffusion's keys, without a prefix.
            num_head_channels: Width of an attention head.
            **rest: Further fields of :class:`UNetConfig` that shapes can't tell.

        Raises:
            ValueError: The keys are not those of a guided-diffusion U-Net, or ``rest`` names a
                field that is read off the shapes.
        """
        if unknown := set(rest) - _NOT_IN_SHAPES:
            raise ValueError(
                f"{sorted(unknown)} can't be asked for here; what shapes don't tell is "
                f"{sorted(_NOT_IN_SHAPES | {'num_head_channels'})}"
            )
        found = read_architecture(state_dict)
        if not found:
            raise ValueError("the state dict stops short of the U-Net's last block")
        return cls(num_head_channels=num_head_channels, **rest, **found)

    def replace(self, **changes: Any) -> UNetConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def num_encoder_blocks(self) -> int:
        """Number of encoder blocks; the decoder has as many, the middle is one."""
        return len(self.channel_mult) * (self.num_res_blocks + 1)

    @property
    def num_blocks(self) -> int:
        """Number of all blocks: 37 for the 256-px models."""
        return 2 * self.num_encoder_blocks + 1

    def mirror(self, index: int) -> int:
        """The block on the other side of the U: 38 - b for the 256-px models (1-based)."""
        return self.num_blocks + 1 - index

    @functools.cached_property
    def blocks(self) -> dict[int, BlockInfo]:
        """The table of blocks by 1-based number: encoder, middle, decoder."""
        return {block.index: block for block in _block_table(self)}

    def heads(self, channels: int, decoder: bool = False) -> int:
        """Number of attention heads of a layer with ``channels`` channels."""
        if self.num_head_channels is not None:
            return channels // self.num_head_channels
        if decoder and self.num_heads_upsample is not None:
            return self.num_heads_upsample
        return self.num_heads

    def kept_values(self, index: int) -> float:
        """Values that training a block (1-based) keeps for its backward pass, for each pixel.

        What its norms and convolutions read, the attention's q, k, v and result; not the weights.
        The memory is this times the pixels of the batch times the bytes of a value.
        """
        info = self.blocks[index]
        before = info.in_channels / self.stride_before(index) ** 2
        after = info.channels / info.stride**2
        if index == 1:
            return before
        if info.resample == "down":
            if not self.resblock_updown:
                return before
            return before + info.in_channels / info.stride**2 + 2 * after
        inner = info.channels / self.stride_before(index) ** 2
        kept = before + before + 2 * inner  # norm, convolution; norm, convolution
        if info.attention:
            kept += 6 * inner  # norm, tokens, q, k, v, result
        if info.name == "middle_block":
            kept += 4 * inner
        if info.resample == "up":
            kept += inner
            if self.resblock_updown:
                kept += 3 * after
            elif self.conv_resample:
                kept += after
        return kept

    def stride_before(self, index: int) -> int:
        """Stride of what a block (1-based) reads."""
        return self.blocks[index - 1].stride if index > 1 else 1

    def check_blocks(self, blocks: Iterable[int], what: str = "blocks") -> tuple[int, ...]:
        """Validate block numbers.

        Raises:
            ValueError: Not a block number of this network; the message gives the range.
        """
        given = tuple(blocks)
        numbers = tuple(map(integer, given))
        if not numbers or any(b not in self.blocks for b in numbers):
            raise ValueError(
                f"{what} must be block numbers from 1 to {self.num_blocks} (1-based: encoder 1-"
                f"{self.num_encoder_blocks}, middle {self.num_encoder_blocks + 1}, decoder "
                f"{self.num_encoder_blocks + 2}-{self.num_blocks}), got {shorten(list(given))}"
            )
        return numbers


_LARGEST = {
    "model_channels": 8192,
    "num_res_blocks": 64,
    "in_channels": 1024,
    "out_channels": 1024,
    "num_head_channels": 8192,
    "num_heads": 8192,
    "num_heads_upsample": 8192,
    "num_classes": 1_000_000,
    "image_size": 65536,
}
"""Whole numbers of a configuration, each from 1: far more than any U-Net has, but no more than can
be counted, so that a slip of the pen is an error and not a machine without memory."""
_MAY_BE_NONE = ("num_head_channels", "num_heads_upsample", "num_classes")
_FLAGS = ("use_scale_shift_norm", "resblock_updown", "conv_resample", "use_new_attention_order")
_MAX_LEVELS, _MAX_WIDTH = 10, 16384


def is_number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf


def integer(value: object) -> int | None:
    """A Python or numpy integer as an int; None for anything else, booleans included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """A tuple of a list from a config; a single integer becomes a tuple of one.

    Raises:
        ValueError: It is neither.
    """
    if integer(values) is not None:
        return (values,)
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of integers, got {shorten(values)}")
    return tuple(values)


def _check_fields(config: UNetConfig) -> None:
    """Types and bounds of the single fields."""
    for name, largest in _LARGEST.items():
        value = getattr(config, name)
        optional = name in _MAY_BE_NONE
        if not ((optional and value is None) or (is_number(value, int) and 1 <= value <= largest)):
            raise ValueError(
                f"{name} must be a positive integer{' or None' * optional}, got {shorten(value)} "
                f"(at most {largest})"
            )
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be True or False, got {shorten(getattr(config, name))}")
    mults, strides = config.channel_mult, config.attention_strides
    numbers = all(is_number(m) and 0 < m * config.model_channels <= _MAX_WIDTH for m in mults)
    if not 1 <= len(mults) <= _MAX_LEVELS or not numbers:
        raise ValueError(
            f"channel_mult must hold a number for each level, 1 to {_MAX_LEVELS} of them (at most "
            f"{_MAX_WIDTH} channels: model_channels={config.model_channels}), got {shorten(mults)}"
        )
    if not all(is_number(stride, int) for stride in strides):
        raise ValueError(f"attention_strides must be integers, got {shorten(strides)}")
    if not is_number(config.dropout) or not 0 <= config.dropout <= 1:
        raise ValueError(f"dropout must be a number from 0 to 1, got {shorten(config.dropout)}")


_NOT_IN_SHAPES = {
    "num_heads",
    "num_heads_upsample",
    "use_new_attention_order",
    "dropout",
    "image_size",
    "noise_schedule",
}

_GD256 = UNetConfig()
PRESETS: dict[str, UNetConfig] = {
    "gd64": UNetConfig(
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_strides=(2, 4, 8),
        use_new_attention_order=True,
        num_classes=1000,
        dropout=0.1,
        image_size=64,
        noise_schedule="cosine",
    ),
    "gd128": UNetConfig(
        channel_mult=(1, 1, 2, 3, 4),
        attention_strides=(4, 8, 16),
        num_head_channels=None,
        num_heads=4,
        num_classes=1000,
        image_size=128,
    ),
    "gd256": _GD256.replace(num_classes=1000),
    "gd256_uncond": _GD256,
    "gd512": UNetConfig(
        channel_mult=(0.5, 1, 1, 2, 2, 4, 4),
        attention_strides=(16, 32, 64),
        num_classes=1000,
        image_size=512,
    ),
    "lsun_bedroom": _GD256.replace(dropout=0.1),
    "lsun_cat": _GD256.replace(dropout=0.1),
    "lsun_horse": _GD256.replace(dropout=0.1),
    "tiny": UNetConfig(
        model_channels=32,
        channel_mult=(1, 1, 2, 2, 2, 3),
        num_head_channels=32,
        image_size=64,
    ),
}
"""Configurations of OpenAI's released image models, and a small one for trying things out."""


def _block_table(config: UNetConfig) -> Iterable[BlockInfo]:
    """Derive the table of blocks (index, channels, stride, ...) from the configuration."""
    widths, last_level = config.widths, len(config.widths) - 1
    channels, stride, index = widths[0], 1, 1
    skips = [channels]
    yield BlockInfo(index, channels, stride, "input_blocks.0", config.in_channels)
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            index += 1
            attention = stride in config.attention_strides
            name = f"input_blocks.{index - 1}"
            yield BlockInfo(index, width, stride, name, channels, attention)
            channels = width
            skips.append(channels)
        if level != last_level:
            index, stride = index + 1, 2 * stride
            name = f"input_blocks.{index - 1}"
            yield BlockInfo(index, channels, stride, name, channels, resample="down")
            skips.append(channels)
    index += 1
    first = index + 1
    yield BlockInfo(index, channels, stride, "middle_block", channels, attention=True)
    for level in range(last_level, -1, -1):
        for position in range(config.num_res_blocks + 1):
            index += 1
            up = level > 0 and position == config.num_res_blocks
            attention = stride in config.attention_strides
            yield BlockInfo(
                index,
                widths[level],
                stride // 2 if up else stride,
                f"output_blocks.{index - first}",
                channels + skips.pop(),
                attention,
                "up" if up else None,
            )
            channels = widths[level]
        stride //= 2


def read_architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of :class:`UNetConfig` that the shapes of a state dict determine.

    Args:
        state_dict: guided-diffusion's keys, without a prefix. One that stops short of the last
            decoder block does not tell everything, and gives an empty result.

    Raises:
        ValueError: The keys are not those of a guided-diffusion U-Net.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in state_dict:
            raise ValueError(
                f"not a guided-diffusion U-Net: {key!r} is missing (first keys: "
                f"{', '.join(list(state_dict)[:4]) or 'none'})"
            )
        if 0 in state_dict[key].shape:
            raise ValueError(f"not a guided-diffusion U-Net: {key!r} has no values")
        return tuple(state_dict[key].shape)

    def indices(part: str) -> list[int]:
        keys = (key.split(".") for key in state_dict if key.startswith(part + "."))
        return sorted({int(parts[1]) for parts in keys if len(parts) > 1 and parts[1].isdecimal()})

    def upsamples(index: int) -> bool:
        names = (f"output_blocks.{index}.{i}.{n}" for i in (1, 2) for n in ("conv", "in_layers.0"))
        return any(f"{name}.weight" in state_dict for name in names)

    model_channels = shape("time_embed.0.weight")[1]
    encoder, decoder = indices("input_blocks"), indices("output_blocks")
    if encoder and not decoder and any(key.startswith("out.") for key in state_dict):
        raise ValueError(
            "this is a classifier (an encoder without output_blocks), not a diffusion U-Net; take "
            "the file with 'diffusion' in its name"
        )
    if not encoder:
        raise ValueError("not a guided-diffusion U-Net: there are no input_blocks")
    size = encoder[-1] + 1  # blocks of encoder and of decoder: levels * (num_res_blocks + 1)
    if len(decoder) != size or decoder[-1] != size - 1 or "out.2.weight" not in state_dict:
        return {}
    gaps = sorted(set(range(size)) - set(encoder))  # pooling has no parameters, hence no keys
    ups = [index for index in decoder if upsamples(index)]
    per_level = gaps[0] if gaps else ups[0] + 1 if ups else size
    levels, remainder = divmod(size, per_level)
    if remainder or per_level < 2:
        raise ValueError(
            f"not a guided-diffusion U-Net: {size} encoder blocks don't make levels of {per_level}"
        )

    firsts = [1 + level * per_level for level in range(levels)]
    mults = []
    for first in firsts:
        width = shape(f"input_blocks.{first}.0.in_layers.2.weight")[0]
        mult = width / model_channels
        if int(mult * model_channels) < width:  # rounding of the division
            mult = math.nextafter(mult, math.inf)
        mults.append(int(mult) if mult == int(mult) else mult)
    width = shape("input_blocks.1.0.out_layers.3.weight")[0]
    down = f"input_blocks.{per_level}.0."
    label = "label_emb.weight"
    return {
        "model_channels": model_channels,
        "channel_mult": tuple(mults),
        "num_res_blocks": per_level - 1,
        "attention_strides": tuple(
            2**level
            for level, first in enumerate(firsts)
            if f"input_blocks.{first}.1.qkv.weight" in state_dict
        ),
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "use_scale_shift_norm": shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * width,
        "resblock_updown": levels > 1 and down + "in_layers.2.weight" in state_dict,
        "conv_resample": levels == 1 or not gaps,
        "num_classes": shape(label)[0] if label in state_dict else None,
    }


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps, cosines first.

    Args:
        t: Timesteps (N,), fractions allowed.
        dim: Width of the embedding, even.

    Returns:
        Embedding (N, dim), float32.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of maps (N, C, H, W) to ``size``; the same tensor where it fits already."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ResBlock(nn.Module):
    """Residual block with a time embedding, which may resample by a factor of two."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        emb_channels: int,
        dropout: float,
        use_scale_shift_norm: bool,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resample = resample
        self.in_layers = nn.Sequential(
            GroupNorm32(in_channels),
            nn.SiLU(),
            Conv3x3(in_channels, channels),
        )
        emb_out = 2 * channels if use_scale_shift_norm else channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            GroupNorm32(channels),
            nn.SiLU(),
            nn.Dropout(dropout),
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
    """Halve the resolution by a strided convolution or by pooling."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H/2, W/2); the embedding is not used."""
        return self.op(x)


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours, then an optional convolution."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 2H, 2W); the embedding is not used."""
        if isinstance(self.conv, Conv3x3):
            return self.conv(x, upsample=True)
        return _resample(x, "up")


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with a residual connection.

    q, k and v keep their last dimension contiguous, so that
    :func:`torch.nn.functional.scaled_dot_product_attention` takes a kernel whose memory is linear
    in the number of positions.
    """

    def __init__(self, channels: int, num_heads: int, new_order: bool) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{num_heads} attention heads don't divide {channels} channels")
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
    """Set the parameters of a residual branch's last layer to zero, as guided-diffusion does."""
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


@dataclasses.dataclass
class TraversalState:
    """Where a run through the U-Net stands, so that it can go on from there.

    Attributes:
        index: The last block that ran (1-based); 0 before the first.
        h: Its output (N, C, H, W).
        emb: Time embedding (N or 1, E).
        last: The last block that anybody will ask for; skips that only later blocks read are not
            kept.
        skips: Encoder outputs that a block up to ``last`` still reads, by block number.
        recompute: Blocks that the backward pass computes again, by number.
    """

    index: int
    h: Tensor
    emb: Tensor
    last: int
    skips: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    recompute: frozenset[int] = frozenset()

    def inject(self, maps: Sequence[Tensor]) -> None:
        """Add maps to the last block's output, resized bilinearly; the skip carries the sum."""
        for extra in maps:
            self.h = self.h + resize(extra, self.h.shape[-2:]).to(self.h.dtype)
        if self.index in self.skips:
            self.skips[self.index] = self.h


def check_budget(budget: float | None) -> float | None:
    """Validate GB of activations to keep; None for no limit.

    Raises:
        ValueError: Not a number from 0.
    """
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if budget is not None and not (number and budget >= 0):
        raise ValueError(
            "activation_budget must be a number of GB from 0, or None for no limit, got "
            f"{shorten(budget)}"
        )
    return budget


class UNet(nn.Module):
    """guided-diffusion's U-Net, built as far as its last block that is asked for.

    Args:
        config: Architecture.
        last_block: Build blocks 1 to this one (1-based) and no output layer; None builds all.
        activation_checkpointing: Recompute each block in the backward pass instead of keeping its
            activations.
        activation_budget: GB of activations that a run may keep for the backward pass. As many
            blocks are recomputed as that takes, those with the largest maps first: they free the
            most memory for the time. None sets no limit.

    Attributes:
        blocks: The table of all blocks of the architecture, by 1-based number.

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
        super().__init__()
        self.config = config
        self.blocks = config.blocks
        self.last_block = config.num_blocks
        if last_block is not None:
            (self.last_block,) = config.check_blocks([last_block], "last_block")
        self.activation_checkpointing = activation_checkpointing
        self.activation_budget = check_budget(activation_budget)

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
        for info in list(self.blocks.values())[: self.last_block]:
            block = Block(*self._layers(info))
            part = info.name.split(".")[0]
            if part == "middle_block":
                self.middle_block = block
            else:
                getattr(self, part).append(block)
        if last_block is None:
            self.out = nn.Sequential(
                GroupNorm32(config.widths[0]),
                nn.SiLU(),
                _zero(Conv3x3(config.widths[0], config.out_channels)),
            )

    def _layers(self, info: BlockInfo) -> Iterable[nn.Module]:
        """The layers of one block, in guided-diffusion's order."""
        config = self.config
        emb_channels = 4 * config.model_channels
        decoder = info.name.startswith("output")

        def residual(in_channels: int, resample: str | None = None) -> ResBlock:
            return ResBlock(
                in_channels,
                info.channels,
                emb_channels,
                config.dropout,
                config.use_scale_shift_norm,
                resample,
            )

        if info.index == 1:
            yield Conv3x3(info.in_channels, info.channels)
            return
        if info.resample == "down":
            if config.resblock_updown:
                yield residual(info.in_channels, "down")
            else:
                yield Downsample(info.channels, config.conv_resample)
            return
        yield residual(info.in_channels)
        if info.attention:
            heads = config.heads(info.channels, decoder)
            yield AttentionBlock(info.channels, heads, config.use_new_attention_order)
        if info.name == "middle_block":
            yield residual(info.channels)
        if info.resample == "up":
            if config.resblock_updown:
                yield residual(info.channels, "up")
            else:
                yield Upsample(info.channels, config.conv_resample)

    def module(self, index: int) -> Block:
        """The module of a block (1-based)."""
        encoder = self.config.num_encoder_blocks
        if index <= encoder:
            return self.input_blocks[index - 1]
        if index == encoder + 1:
            return self.middle_block
        return self.output_blocks[index - encoder - 2]

    def embed(self, t: Tensor | int | float, y: Tensor | None = None, device=None) -> Tensor:
        """Time (and class) embedding.

        Args:
            t: Timesteps (N,) or (1,), or one number for the whole batch.
            y: Class labels (N,), for a class-conditional model.
            device: Where a number ``t`` is put.

        Returns:
            Embedding (N, E), or (1, E) where one timestep serves the whole batch.
        """
        if not isinstance(t, Tensor):
            t = torch.full((1,), float(t), device=device)
        weight = self.time_embed[0].weight
        emb = timestep_embedding(t.reshape(-1), self.config.model_channels).to(weight.dtype)
        emb = self.time_embed(emb)
        return emb if y is None else emb + self.label_emb(y)

    def start(
        self, x_t: Tensor, t: Tensor | int | float, last: int, y: Tensor | None = None
    ) -> TraversalState:
        """Begin a run that goes no further than block ``last``.

        Args:
            x_t: Noised images (N, C, H, W); H and W multiples of the deepest stride.
            t: Timesteps (N,) or (1,), or one number.
            last: The last block that will be asked for (1-based).
            y: Class labels (N,), for a class-conditional model.

        Raises:
            ValueError: ``last`` is not built, or the labels don't fit.
        """
        self.config.check_blocks([last])
        if last > self.last_block:
            raise ValueError(
                f"block {last} is not built: this U-Net ends at block {self.last_block}"
            )
        deepest = max(self.blocks[b].stride for b in range(1, last + 1))
        if x_t.shape[-2] % deepest or x_t.shape[-1] % deepest:
            raise ValueError(
                f"height and width must be multiples of {deepest}, got {tuple(x_t.shape[-2:])}"
            )
        self._check_labels(y, x_t.shape[0])
        emb = self.embed(t, y, x_t.device)
        x_t = x_t.to(self.time_embed[0].weight.dtype)
        state = TraversalState(0, x_t, emb, last)
        if torch.is_grad_enabled():
            state.recompute = self._recomputed_blocks(x_t, last)
        return state

    def _check_labels(self, y: Tensor | None, count: int) -> None:
        classes = self.config.num_classes
        if (y is None) != (classes is None):
            raise ValueError(
                f"this U-Net is class-conditional ({classes} classes): labels y are needed, or "
                "leave the label embedding out with config.replace(num_classes=None)"
                if y is None
                else "labels y were given, but this U-Net is not class-conditional"
            )
        if y is None:
            return
        if y.shape != (count,) or y.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"labels y must be integers of shape ({count},), one for each image, got "
                f"{y.dtype} of shape {tuple(y.shape)}"
            )
        if is_readable(y):
            low, high = torch.stack(torch.aminmax(y)).tolist()
            if low < 0 or high >= classes:
                raise ValueError(
                    f"labels y must lie in 0..{classes - 1}, got values from {low} to {high}"
                )

    def _recomputed_blocks(self, x_t: Tensor, last: int) -> frozenset[int]:
        """The blocks to recompute in the backward pass of a run to block ``last``."""
        if self.activation_checkpointing:
            return frozenset(range(1, last + 1))
        if self.activation_budget is None:
            return frozenset()
        bytes_each = x_t.element_size()
        if autocasts(x_t):
            bytes_each = 2
        pixels = x_t.shape[0] * x_t.shape[2] * x_t.shape[3]
        kept = {b: bytes_each * pixels * self.config.kept_values(b) for b in range(1, last + 1)}
        budget, chosen = self.activation_budget * 1e9, set()
        for index in sorted(kept, key=lambda b: (self.blocks[b].stride, b)):
            if sum(kept.values()) <= budget:
                break
            info = self.blocks[index]  # what it reads is kept all the same
            kept[index] = (
                bytes_each * pixels * info.in_channels / self.config.stride_before(index) ** 2
            )
            chosen.add(index)
        return frozenset(chosen)

    def traverse(
        self,
        state: TraversalState,
        stop: int,
        taps: Collection[int] = (),
        inject: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> dict[int, Tensor]:
        """Run the blocks after ``state.index`` up to ``stop``; the one traversal of this network.

        Args:
            state: Where to go on from; it is advanced.
            stop: The last block to run (1-based).
            taps: Blocks whose outputs are returned.
            inject: Maps to add to the output of a block, before it is tapped and before its skip
                is kept; resized bilinearly where sizes differ.

        Returns:
            The outputs of the tapped blocks that ran, (N, C_b, H/stride_b, W/stride_b).
        """
        outputs: dict[int, Tensor] = {}
        encoder = self.config.num_encoder_blocks
        state.h = layout(state.h)
        for index in range(state.index + 1, stop + 1):
            mirror = self.config.mirror(index)
            if index > encoder + 1:
                state.h = torch.cat([state.h, state.skips.pop(mirror)], dim=1)
            state.h = self._run_block(index, state)
            state.index = index
            if index <= encoder and mirror <= state.last:
                state.skips[index] = state.h
            if inject and index in inject:
                state.inject(inject[index])
            if index in taps:
                outputs[index] = state.h
        return outputs

    def fork(self, state: TraversalState, last: int) -> TraversalState:
        """An independent copy of a state that goes no further than block ``last``.

        Args:
            state: Where the run stands.
            last: The last block that the copy will be asked for (1-based).
        """
        skips = {i: skip for i, skip in state.skips.items() if self.config.mirror(i) <= last}
        return TraversalState(state.index, state.h, state.emb, last, skips, state.recompute)

    def _run_block(self, index: int, state: TraversalState) -> Tensor:
        block = self.module(index)
        if index in state.recompute and torch.is_grad_enabled():
            return activation_checkpoint(block, state.h, state.emb, use_reentrant=False)
        return block(state.h, state.emb)

    def forward_features(
        self,
        x_t: Tensor,
        t: Tensor | int | float,
        blocks: Iterable[int],
        y: Tensor | None = None,
        inject: Mapping[int, Tensor | Sequence[Tensor]] | None = None,
    ) -> dict[int, Tensor]:
        """Outputs of any blocks in one run, which stops after the last of them.

        Args:
            x_t: Noised images (N, C, H, W); H and W multiples of the deepest stride.
            t: Timesteps (N,) or (1,), 0-based indices into the schedule, or one number.
            blocks: Block numbers (1-based).
            y: Class labels (N,), for a class-conditional model.
            inject: Maps (N, C_b, h, w) to add to the output of block b, resized bilinearly where
                sizes differ; the skip carries the sum.

        Returns:
            ``{b: (N, C_b, H/stride_b, W/stride_b)}`` in the order asked for.

        Raises:
            ValueError: A block is out of range or not built, or the size or labels don't fit.
        """
        wanted = self.config.check_blocks(blocks)
        extra = {
            index: [maps] if isinstance(maps, Tensor) else list(maps)
            for index, maps in (inject or {}).items()
        }
        if extra:
            self.config.check_blocks(extra, "inject")
        state = self.start(x_t, t, max(wanted), y)
        outputs = self.traverse(state, max(wanted), wanted, extra)
        return {index: outputs[index] for index in wanted}

    def forward(self, x_t: Tensor, t: Tensor | int | float, y: Tensor | None = None) -> Tensor:
        """The model's own output: noise (N, 3, H, W), or noise and variance (N, 6, H, W).

        Args:
            x_t: Noised images (N, C, H, W); H and W multiples of the deepest stride.
            t: Timesteps (N,) or (1,), 0-based, or one number.
            y: Class labels (N,), for a class-conditional model.

        Raises:
            ValueError: The U-Net was built without its last blocks, or the size or labels don't
                fit.
        """
        if not hasattr(self, "out"):
            raise ValueError(f"this U-Net ends at block {self.last_block} and has no output layer")
        state = self.start(x_t, t, self.config.num_blocks, y)
        self.traverse(state, self.config.num_blocks)
        norm, _, conv = self.out
        return conv(norm(state.h, silu=True)).to(x_t.dtype)
