"""timm: importing this module registers the presets as ``diffbackbone_<preset>``.

For instance ``timm.create_model("diffbackbone_gd256_uncond", features_only=True)``.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.models.gd_config import PRESETS
from diffbackbone.sources import PACKAGED, RELEASED_CHECKPOINTS

default_cfgs: dict[str, dict[str, Any]] = {}  # timm reads it when a model is registered


class DiffusionFeatures(nn.Module):
    """A backbone with timm's interface.

    Args:
        preset: One of :data:`diffbackbone.models.gd_config.PRESETS`.
        num_classes: Classes of a linear layer on the mean of the coarsest map; 0 for no layer.
        in_chans: Channels of the images.
        **options: Arguments of :class:`diffbackbone.DiffusionBackbone`. By default the blocks are
            the last of each stride above 1 (33, 30, 27, 24 and 21 in the 256-px models), and maps
            keep their channels and strides. Blocks go from fine to coarse.
    """

    def __init__(
        self, preset: str, num_classes: int = 0, in_chans: int = 3, **options: Any
    ) -> None:
        super().__init__()
        if in_chans != 3:
            options["in_channels"] = in_chans
        taps = DiffusionBackbone(preset, **{"out_channels": None, "out_strides": None, **options})
        self.backbone = taps
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": f"block{block}"}
            for block, channels, stride in zip(taps.blocks, taps.channels, taps.strides)
        ]
        self.num_classes, self.num_features = num_classes, taps.channels[-1]
        self.head = nn.Linear(taps.channels[-1], num_classes) if num_classes else nn.Identity()

    def forward_intermediates(
        self, x: Tensor, indices: Any = None, intermediates_only: bool = False, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the coarsest map and those at ``indices``, of RGB (N, 3, H, W) in [-1, 1]."""
        maps = self.backbone(x)
        chosen = [maps[i] for i in feature_take_indices(len(maps), indices)[0]]
        return chosen if intermediates_only else (maps[-1], chosen)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (N, num_classes), without classes the mean of the coarsest map (N, C)."""
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def _register(preset: str, checkpoint: str) -> None:
    config, name = PRESETS[preset], f"diffbackbone_{preset}"
    last = {info.stride: b for b, info in config.blocks.items() if info.stride > 1}
    data = {"input_size": (3, *[config.image_size] * 2), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    default_cfgs[name] = {"url": checkpoint, "num_classes": 0, **data}

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            overlay = kwargs.get("pretrained_cfg_overlay") or {}
            kwargs.setdefault("checkpoint", overlay.get("file", checkpoint))
        count = len(kwargs.setdefault("blocks", [last[stride] for stride in sorted(last)]))
        kwargs["feature_cfg"] = {"feature_cls": "getter", "out_indices": tuple(range(count))}
        return build_model_with_cfg(DiffusionFeatures, name, False, preset=preset, **kwargs)

    build.__name__ = name
    register_model(build)


for _preset in PRESETS:
    _register(_preset, RELEASED_CHECKPOINTS.get(_preset, f"{PACKAGED}{_preset}.safetensors"))
