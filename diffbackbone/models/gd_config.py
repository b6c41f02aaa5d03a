"""Architecture of guided-diffusion's U-Net: configuration, presets, table of blocks.

Reference: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffbackbone.models.base import BlockInfo, BlockTable, is_number
from diffbackbone.models.ops import GROUPS
from diffbackbone.utils import check_names


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
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("num_head_channels", "num_heads_upsample"):  # guided-diffusion writes -1
            if getattr(self, name) == -1:
                object.__setattr__(self, name, None)
        for name, valid, wanted in _constraints(self):
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r:.200}")

    @classmethod
    def from_preset(cls, name: str) -> UNetConfig:
        """Return one of :data:`PRESETS`: a released model, or ``tiny``.

        ``tiny`` has the same 37 blocks and strides as the 256-px models at an eighth of the width
        and less, so block numbers carry over.

        Raises:
            ValueError: Unknown preset; the message lists the known ones.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset {name!r:.200}; choose from {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        num_head_channels: int | None = 64,
        **rest: Any,
    ) -> UNetConfig:
        """Read the architecture off the shapes of a guided-diffusion state dict.

        Args:
            state_dict: guided-diffusion's keys, without a prefix.
            num_head_channels: Width of an attention head; None to give ``num_heads``.
            **rest: Further fields that shapes can't tell: ``num_heads``, ``dropout``,
                ``use_new_attention_order``, ``image_size`` and ``noise_schedule``.

        Raises:
            ValueError: The keys are not those of a whole guided-diffusion U-Net.
        """
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

    @functools.cached_property
    def blocks(self) -> BlockTable:
        """The table of blocks: encoder, middle, decoder; 37 for the 256-px models."""
        return _block_table(self)

    def heads(self, channels: int, decoder: bool = False) -> int:
        """Number of attention heads of a layer with ``channels`` channels."""
        if self.num_head_channels is not None:
            return channels // self.num_head_channels
        if decoder and self.num_heads_upsample is not None:
            return self.num_heads_upsample
        return self.num_heads


_INTEGERS = ("model_channels", "num_res_blocks", "in_channels", "out_channels", "num_heads")
_OPTIONAL = ("num_head_channels", "num_heads_upsample", "num_classes")
_FLAGS = ("use_scale_shift_norm", "resblock_updown", "conv_resample", "use_new_attention_order")
_LARGEST, _MAX_LEVELS, _MAX_WIDTH = 65536, 10, 16384
"""Bounds that reject typos before they allocate huge tensors."""


def _constraints(config: UNetConfig) -> Iterator[tuple[str, bool, str]]:
    """Yield field, whether its value is allowed, and what is; later ones rely on earlier ones."""
    for name in (*_INTEGERS, "image_size", *_OPTIONAL):
        value, optional = getattr(config, name), name in _OPTIONAL
        valid = is_number(value, int) and 1 <= value <= _LARGEST
        wanted = f"an integer from 1 to {_LARGEST}{' or None' * optional}"
        yield name, valid or (optional and value is None), wanted
    for name in _FLAGS:
        yield name, isinstance(getattr(config, name), bool), "True or False"
    mults = config.channel_mult
    numbers = all(is_number(mult) and mult > 0 for mult in mults)
    wanted = f"a positive number for each of 1 to {_MAX_LEVELS} levels"
    yield "channel_mult", numbers and 1 <= len(mults) <= _MAX_LEVELS, wanted
    widths = all(GROUPS <= w <= _MAX_WIDTH and w % GROUPS == 0 for w in config.widths)
    wanted = f"such that all levels are a multiple of {GROUPS} and at most {_MAX_WIDTH} wide"
    yield "channel_mult", widths, f"{wanted} with model_channels {config.model_channels}"
    strides = [2**level for level in range(len(mults))]
    yield "attention_strides", set(config.attention_strides) <= set(strides), f"of {strides}"
    heads = ("num_heads", "num_heads_upsample")
    names = ("num_head_channels",) if config.num_head_channels else heads
    for name, (width, stride) in itertools.product(names, zip(config.widths, strides)):
        attended = stride == strides[-1] or stride in config.attention_strides
        divides = width % (getattr(config, name) or 1) == 0
        yield name, divides or not attended, f"a divisor of the {width} channels at stride {stride}"
    yield "dropout", is_number(config.dropout) and 0 <= config.dropout <= 1, "from 0 to 1"
    schedules = ("linear", "cosine")
    yield "noise_schedule", config.noise_schedule in schedules, "'linear' or 'cosine'"


_GD256 = UNetConfig()
PRESETS: dict[str, UNetConfig] = {
    "gd64": UNetConfig(
        model_channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3,
        attention_strides=(2, 4, 8), use_new_attention_order=True, num_classes=1000, dropout=0.1,
        image_size=64, noise_schedule="cosine",
    ),
    "gd128": UNetConfig(
        channel_mult=(1, 1, 2, 3, 4), attention_strides=(4, 8, 16), num_head_channels=None,
        num_heads=4, num_classes=1000, image_size=128,
    ),
    "gd256": _GD256.replace(num_classes=1000),
    "gd256_uncond": _GD256,
    "gd512": UNetConfig(
        channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention_strides=(16, 32, 64), num_classes=1000,
        image_size=512,
    ),
    "lsun_bedroom": _GD256.replace(dropout=0.1),
    "lsun_cat": _GD256.replace(dropout=0.1),
    "lsun_horse": _GD256.replace(dropout=0.1),
    "tiny": UNetConfig(
        model_channels=32, channel_mult=(1, 1, 2, 2, 2, 3), num_head_channels=32, image_size=64
    ),
}  # fmt: skip
"""Configurations of OpenAI's released image models, and a small one for trying things out."""


def _block_table(config: UNetConfig) -> BlockTable:
    """Derive the blocks (index, channels, stride, ...) from the configuration."""
    widths = config.widths
    infos: list[BlockInfo] = []

    def add(
        name: str,
        in_channels: int,
        channels: int,
        attention: bool = False,
        resample: str | None = None,
        part: str = "encoder",
    ) -> None:
        index, before = len(infos) + 1, infos[-1].stride if infos else 1
        stride = {"down": 2 * before, "up": before // 2, None: before}[resample]
        info = BlockInfo(index, channels, stride, name, in_channels, attention, resample, part)
        kept, read = _kept_values(config, info, before), in_channels / before**2
        infos.append(dataclasses.replace(info, kept_values=kept, read_values=read))

    attended = [2**level in config.attention_strides for level in range(len(widths))]
    add("input_blocks.0", config.in_channels, widths[0])
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            add(f"input_blocks.{len(infos)}", infos[-1].channels, width, attended[level])
        if level < len(widths) - 1:
            add(f"input_blocks.{len(infos)}", width, width, resample="down")
    skips = [info.channels for info in infos]
    add("middle_block", widths[-1], widths[-1], True, part="middle")
    size = len(skips)
    for number in range(size):
        level = len(widths) - 1 - number // (config.num_res_blocks + 1)
        up = level > 0 and (number + 1) % (config.num_res_blocks + 1) == 0
        in_channels = infos[-1].channels + skips.pop()
        resample = "up" if up else None
        name = f"output_blocks.{number}"
        add(name, in_channels, widths[level], attended[level], resample, "decoder")
    return BlockTable(infos)


def _kept_values(config: UNetConfig, info: BlockInfo, stride_before: int) -> float:
    """Count what norms, convolutions and attention of a block read, per pixel of the image."""
    before = info.in_channels / stride_before**2
    after = info.channels / info.stride**2
    if info.index == 1:
        return before
    if info.resample == "down":
        if not config.resblock_updown:
            return before
        return before + info.in_channels / info.stride**2 + 2 * after
    inner = info.channels / stride_before**2
    kept = before + before + 2 * inner  # norm, convolution; norm, convolution
    if info.attention:
        kept += 6 * inner  # norm, tokens, q, k, v, result
    if info.part == "middle":
        kept += 4 * inner
    if info.resample == "up":
        kept += inner
        if config.resblock_updown:
            kept += 3 * after
        elif config.conv_resample:
            kept += after
    return kept


def read_architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of :class:`UNetConfig` that the shapes of a state dict determine.

    Args:
        state_dict: guided-diffusion's keys, without a prefix. One that stops short of the last
            decoder block does not tell everything, and gives an empty result.

    Raises:
        ValueError: The keys are not those of a guided-diffusion U-Net.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in state_dict or 0 in state_dict[key].shape:
            first = ", ".join(list(state_dict)[:4])
            raise ValueError(f"not a guided-diffusion U-Net: no {key!r}; first keys: {first}")
        return tuple(state_dict[key].shape)

    def indices(part: str) -> list[int]:
        keys = (key.split(".") for key in state_dict if key.startswith(part + "."))
        return sorted({int(parts[1]) for parts in keys if parts[1].isdecimal()})

    def upsamples(index: int) -> bool:
        names = (f"output_blocks.{index}.{i}.{n}" for i in (1, 2) for n in ("conv", "in_layers.0"))
        return any(f"{name}.weight" in state_dict for name in names)

    model_channels = shape("time_embed.0.weight")[1]
    in_channels = shape("input_blocks.0.0.weight")[1]
    encoder, decoder = indices("input_blocks"), indices("output_blocks")
    if not decoder and any(key.startswith("out.") for key in state_dict):
        raise ValueError(
            "this is a classifier (an encoder without output_blocks), not a diffusion U-Net; take "
            "the file with 'diffusion' in its name"
        )
    size = encoder[-1] + 1  # blocks of encoder and of decoder: levels * (num_res_blocks + 1)
    if len(decoder) != size or decoder[-1] != size - 1 or "out.2.weight" not in state_dict:
        return {}
    gaps = sorted(set(range(size)) - set(encoder))  # pooling has no parameters, hence no keys
    ups = [index for index in decoder if upsamples(index)]
    per_level = gaps[0] if gaps else ups[0] + 1 if ups else size
    levels, remainder = divmod(size, per_level)
    if remainder:
        return {}

    firsts = [1 + level * per_level for level in range(levels)]
    mults = []
    for first in firsts:
        width = shape(f"input_blocks.{first}.0.in_layers.2.weight")[0]
        mult = width / model_channels
        if int(mult * model_channels) < width:  # rounding of the division
            mult = math.nextafter(mult, math.inf)
        mults.append(int(mult) if mult == int(mult) else mult)
    width = shape("input_blocks.1.0.out_layers.3.weight")[0]
    label = "label_emb.weight"
    return {
        "model_channels": model_channels,
        "channel_mult": tuple(mults),
        "num_res_blocks": per_level - 1,
        "attention_strides": tuple(
            2**i for i, n in enumerate(firsts) if f"input_blocks.{n}.1.qkv.weight" in state_dict
        ),
        "in_channels": in_channels,
        "out_channels": shape("out.2.weight")[0],
        "use_scale_shift_norm": shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * width,
        "resblock_updown": f"input_blocks.{per_level}.0.in_layers.2.weight" in state_dict,
        "conv_resample": levels == 1 or not gaps,
        "num_classes": shape(label)[0] if label in state_dict else None,
    }


def config_fields(unet: Any) -> dict[str, Any]:
    """Return a preset's name, a dict of fields or such a dict as JSON as a dict of fields."""
    if isinstance(unet, str) and unet.lstrip().startswith("{"):
        unet = json.loads(unet)
    return dict(unet) if isinstance(unet, Mapping) else {"preset": unet}


def resolve_config(unet: str | UNetConfig | Mapping[str, Any]) -> UNetConfig:
    """Return a guided-diffusion architecture; see :func:`diffbackbone.models.resolve_network`."""
    config = getattr(unet, "config", unet)
    if isinstance(config, UNetConfig):
        return config
    fields = config_fields(unet)
    base = UNetConfig.from_preset(fields.pop("preset")) if "preset" in fields else UNetConfig()
    check_names("unet", fields, ["preset", *UNetConfig.__dataclass_fields__])
    return base.replace(**fields)
