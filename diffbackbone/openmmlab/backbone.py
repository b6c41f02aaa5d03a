"""The backbone in configs of the OpenMMLab code bases, and layer-wise learning rates."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from diffbackbone.backbone import RANDOM_WEIGHTS
from diffbackbone.backbone import DiffusionBackbone as _DiffusionBackbone
from diffbackbone.optim import layer_scales


@MODELS.register_module()
class DiffusionBackbone(_DiffusionBackbone, BaseModule):
    """:class:`diffbackbone.DiffusionBackbone` for configs of the OpenMMLab code bases.

    Args:
        unet: A preset's name or ``"diffusers://<folder or hub id>"``, or a dict of the fields of
            its configuration (``preset`` names the one to start from).
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with guided-diffusion weights, a path
            or URL. They are loaded by ``init_weights()``, as everywhere in MMEngine; with
            ``freeze`` and without ``save_frozen`` already here, since checkpoints lack them.
        pretrained: The older way to write the same, which wins over ``init_cfg``: the checkpoint's
            path or URL. Unlike ``init_cfg``, mmseg's ``init_model`` and mmdet's ``init_detector``
            don't remove it from the config.
        checkpoint: As ``pretrained``.
        **kwargs: All other arguments of :class:`diffbackbone.DiffusionBackbone`.
    """

    def __init__(
        self,
        unet: str | Mapping[str, Any] = "gd256_uncond",
        init_cfg: dict | list[dict] | None = None,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(unet, **kwargs)
        if weights := pretrained or checkpoint:
            init_cfg = {"type": "Pretrained", "checkpoint": weights}
        given = [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg or []
        self._pretrained = [c for c in given if c["type"] in ("Pretrained", PretrainedInit)]
        self.init_cfg = [c for c in given if c not in self._pretrained]
        if self.frozen and not self.save_frozen:
            for cfg in self._pretrained:
                self._load_initial(cfg["checkpoint"], cfg.get("prefix"))

    def _warn_random(self) -> None:
        """Do nothing: weights come with ``init_weights()`` or with the whole model's."""

    def init_weights(self) -> None:
        """Initialize by ``init_cfg``; guided-diffusion weights come last, as in MMEngine."""
        if self.is_init:
            return
        super().init_weights()
        for cfg in self._pretrained:
            print_log(str(self.load(cfg["checkpoint"], cfg.get("prefix"))), logger="current")
        if not self._pretrained and not self.unet.pretrained:
            print_log(RANDOM_WEIGHTS, logger="current", level=logging.WARNING)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DiffusionOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's ``paramwise_cfg``, with layer-wise learning-rate decay for the U-Net.

    On top of MMEngine's rules (``norm_decay_mult``, ``bias_decay_mult``, ``custom_keys``, ...)
    ``paramwise_cfg`` may hold

    * ``layer_decay_rate``: the learning rate of U-Net block b is multiplied by
      ``rate ** (last - b + 1)``, that of the time embedding by ``rate ** (last + 1)``, where
      ``last`` is the last tapped block; feedback layers, projections and heads keep the base rate.

    Parameters of equal settings share one group, which keeps the optimizer's fused and foreach
    kernels fast. Under FSDP modules have the names that they have without it.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs) -> None:
        """Add the parameters of a module to the groups, by the rules of ``paramwise_cfg``."""
        name = ".".join(part for part in prefix.split(".") if part != "_fsdp_wrapped_module")
        super().add_params(params, module, prefix=name, **kwargs)
        if prefix:
            return
        flat = self.paramwise_cfg.get("flat_decay_mult")
        if flat is not None and hasattr(module, "_fsdp_wrapped_module"):
            raise ValueError(
                "paramwise_cfg has flat_decay_mult, but all of FSDP's shards have one dimension: "
                "use norm_decay_mult and bias_decay_mult"
            )
        scales = layer_scales(module, self.paramwise_cfg.get("layer_decay_rate", 1.0))
        groups: dict[tuple, dict] = {}
        for group in params:
            settings = {key: value for key, value in group.items() if key != "params"}
            (parameter,) = group["params"]
            if id(parameter) in scales:
                settings["lr"] = settings.get("lr", self.base_lr) * scales[id(parameter)]
            key = tuple(sorted(settings.items()))
            groups.setdefault(key, {"params": [], **settings})["params"].append(parameter)
        params[:] = groups.values()
