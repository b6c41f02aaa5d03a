"""Any network of timm behind the tap interface, for comparison with diffusion backbones.

Blocks are what timm's ``forward_intermediates`` reports, counted from 1.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbackbone.models.base import BlockInfo, BlockTable, DiffusionModel, resize
from diffbackbone.utils import UserError, require

_ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False})
"""How the constructors of timm's transformers are told to take images of any size."""


class LevelTable(BlockTable):
    """The blocks of a timm network."""

    no_feedback = "a timm network is a single pass; features are fed back in diffusion U-Nets alone"

    def deepest_stride(self, last: int) -> int:
        """Return the largest stride of all blocks: parallel branches reach it early (HRNet)."""
        return super().deepest_stride(len(self))


class Facts(NamedTuple):
    """What a network tells about itself before its weights are made."""

    blocks: LevelTable
    size: tuple[int, int]  # height and width of the images that it was trained with
    fixed: bool  # whether it takes no other size
    mean: tuple[float, ...]  # of each channel of images in [0, 1]
    std: tuple[float, ...]
    shapes: dict[str, tuple[int, ...] | None]  # of all weights; None for the classifier's


@dataclasses.dataclass(frozen=True)
class TimmConfig:
    """A network of timm.

    Attributes:
        name: timm's name, as for ``timm.create_model``: ``"resnet50"``, or with the tag of its
            weights ``"vit_base_patch14_dinov2.lvd142m"``.
        pretrained: Take timm's weights from the Hugging Face hub unless a file is given.
        norm: Apply the network's last norm to all taps, where timm does that (ViTs).
        options: Further arguments of ``timm.create_model``.

    Raises:
        ValueError: timm has no such network.
        MissingPackageError: timm is not installed.
    """

    name: str
    pretrained: bool = True
    norm: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    num_classes: ClassVar[None] = None
    noise_schedule: ClassVar[str] = "linear"
    timed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(f"timm:{self.name}", ["timm"], "pip install 'diffbackbone[timm]'")
        import timm

        if ":" not in self.name and not timm.is_model(self.name):
            raise ValueError(f"timm has no network {self.name!r}; timm.list_models() lists them")

    def replace(self, **changes: Any) -> TimmConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def blocks(self) -> LevelTable:
        """The table of blocks."""
        return self.facts.blocks

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.options.get("in_chans", 3)

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images that it was trained with."""
        return max(self.facts.size)

    @functools.cached_property
    def facts(self) -> Facts:
        """What the network tells about itself, found on torch's meta device."""
        with torch.device("meta"), torch.no_grad():
            model, any_size = self.create()
            cfg = model.pretrained_cfg
            size = self.options.get("img_size", cfg["input_size"][1:])
            size = (size, size) if isinstance(size, int) else tuple(size)
            image = torch.empty(1, self.in_channels, *size)
            maps = model.eval().forward_intermediates(image, intermediates_only=True)
        infos, before = [], self.in_channels
        for index, (x, info) in enumerate(zip(maps, model.feature_info), 1):
            stride = info["reduction"]  # not measured: 240 px give a map of 8 at stride 32
            if not 0.7 < stride * x.shape[2] / size[0] < 1.4:  # but some are wrong (TResNet)
                stride = round(size[0] / x.shape[2])
            name = f"model.{info['module']}"
            infos.append(BlockInfo(index, x.shape[1], stride, name, before, part="level"))
            before = x.shape[1]
        heads = cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        shapes: dict[str, tuple[int, ...] | None]
        shapes = {f"model.{name}": tuple(x.shape) for name, x in model.state_dict().items()}
        for head in heads:  # which networks without labels get in fine-tuning
            shapes |= {f"model.{head}.weight": None, f"model.{head}.bias": None}
        fixed = bool(cfg.get("fixed_input_size")) and not any_size
        return Facts(LevelTable(infos), size, fixed, cfg["mean"], cfg["std"], shapes)

    def create(self, pretrained: bool = False) -> tuple[nn.Module, bool]:
        """Build timm's network, and return whether it was told to take images of any size."""
        import timm

        try:
            for extra in _ANY_SIZE:
                try:
                    return timm.create_model(self.name, pretrained, **extra, **self.options), True
                except TypeError as error:  # this network's constructor has no such argument
                    if not any(name in str(error) for name in extra):
                        raise
            return timm.create_model(self.name, pretrained, **self.options), False
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise UserError(
                f"the weights of timm:{self.name} can't be had ({error}); give a file of them "
                "as the checkpoint, or pretrained=False for random ones"
            ) from error

    def build(self, pretrained: bool = False, **options: Any) -> TimmModel:
        """Build the network; see :func:`diffbackbone.models.build_network`."""
        return TimmModel(self, pretrained=pretrained, **options)


def resolve(name: str, **fields: Any) -> TimmConfig:
    """Return the configuration of ``timm:<name>``; unknown fields are timm's options."""
    own = {field: fields.pop(field) for field in ("pretrained", "norm") if field in fields}
    return TimmConfig(name, **own, options={**fields.pop("options", {}), **fields})


class TimmModel(DiffusionModel):
    """A network of timm, which has no timestep and reads images as they are.

    Args:
        config: Which network.
        last_block: Build blocks 1 to this one (1-based); None builds all.
        activation_checkpointing: Recompute blocks in the backward pass, as timm does it.
        activation_budget: None.
        pretrained: Load timm's weights, if ``config.pretrained`` allows it.
    """

    timed = False

    def __init__(
        self,
        config: TimmConfig,
        last_block: int | None = None,
        activation_checkpointing: bool = False,
        activation_budget: float | None = None,
        pretrained: bool = False,
    ) -> None:
        if activation_budget is not None:
            raise ValueError(
                "a timm network has no activation_budget; use activation_checkpointing"
            )
        super().__init__(config.blocks, last_block, activation_checkpointing)
        self.config = config
        self.pretrained = pretrained and config.pretrained
        self.model, _ = config.create(self.pretrained)
        self.own_size = config.facts.size
        self.model.prune_intermediate_layers([self.last_block - 1], prune_norm=not config.norm)
        mean, std = (torch.tensor(x)[:, None, None] for x in (config.facts.mean, config.facts.std))
        # (x + 1) / 2 is the image in [0, 1]
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("offset", (0.5 - mean) / std, persistent=False)

    def forward_features(
        self,
        x_t: Tensor,
        t: Tensor | int | float,
        blocks: Iterable[int],
        y: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Return the outputs of any blocks in one run; see :class:`DiffusionModel`.

        Args:
            x_t: Images (N, 3, H, W), RGB in [-1, 1], with or without noise; H and W multiples of
                the deepest stride. A network of fixed size gets them resized.
            t: Not used.
            blocks: Block numbers (1-based).
            y: Not used.
        """
        wanted = self.check_built(blocks)
        x = (x_t * self.scale + self.offset).to(self.weights_dtype)
        size = self.config.facts.size
        resized = self.config.facts.fixed and tuple(x.shape[-2:]) != size
        if resized:
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        if self.activation_checkpointing:
            self.model.set_grad_checkpointing(True)
        indices = sorted({b - 1 for b in wanted})
        maps = self.model.forward_intermediates(
            x, indices=indices, norm=self.config.norm, stop_early=True, intermediates_only=True
        )
        outputs = {index + 1: x for index, x in zip(indices, maps)}
        if resized:
            sides = x_t.shape[-2:]
            for b, x in outputs.items():
                outputs[b] = resize(x, [side // self.blocks[b].stride for side in sides])
        return {b: outputs[b] for b in wanted}

    @property
    def anchor(self) -> str:
        """The first name of a weight in timm's state dict with which no other one ends."""
        names = [name.removeprefix("model.") for name in self.full_shapes]
        return next(name for name in names if sum(other.endswith(name) for other in names) == 1)

    @property
    def full_shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Shapes of all weights of the architecture, also of those that were not built."""
        return self.config.facts.shapes

    def convert(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a file's weights: timm's, or those of the network's authors if timm can."""
        convert = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            with torch.device("meta"):
                whole, _ = self.config.create()
            weights = convert(dict(weights), whole)
        return {f"model.{name}": value for name, value in weights.items()}
