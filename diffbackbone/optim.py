"""Learning-rate factors for fine-tuning."""

from __future__ import annotations

from torch import nn

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.models.base import is_number


def layer_scales(model: nn.Module, rate: float) -> dict[int, float]:
    """Return the learning-rate factors of layer-wise decay for the U-Nets in a model.

    Args:
        model: Any module with one or more :class:`DiffusionBackbone` inside.
        rate: In (0, 1]. The factor of U-Net block b is ``rate ** (last - b + 1)``, that of the
            time embedding ``rate ** (last + 1)``, where ``last`` is the last tapped block.

    Returns:
        ``{id(parameter): factor}`` for the parameters of the U-Nets; all others keep their rate.

    Raises:
        ValueError: The rate is out of range, or there is no backbone in the model.
    """
    if not (is_number(rate) and 0 < rate <= 1):
        raise ValueError(f"the layer decay rate must lie in (0, 1], got {rate!r}")
    backbones = [m for m in model.modules() if isinstance(m, DiffusionBackbone)]
    if not backbones and rate < 1:
        raise ValueError(f"layer decay rate {rate}: there is no DiffusionBackbone in the model")
    scales = {}
    for backbone in backbones:
        unet, last = backbone.unet, max(backbone.blocks)
        for name, parameter in unet.named_parameters():
            if name not in unet.learned:  # time and label embedding; blocks are set below
                scales[id(parameter)] = rate ** (last + 1)
        for index in range(1, unet.last_block + 1):
            for parameter in unet.module(index).parameters():
                scales[id(parameter)] = rate ** max(last - index + 1, 0)
    return scales
