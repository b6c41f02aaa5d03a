"""Optimizers: AdamW, layer-wise learning-rate decay, clipping by the norm of all gradients."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from diffbackbone.optim import layer_scales


def get_optimizer_params(
    model: nn.Module | None = None, layer_decay_rate: float = 1.0, **kwargs: Any
) -> list[dict[str, Any]]:
    """Detectron2's ``get_default_optimizer_params`` with layer-wise decay for the U-Net.

    See :func:`diffbackbone.optim.layer_scales`; a rate other than 1 needs ``base_lr``.
    """
    if layer_decay_rate != 1.0:
        scales = layer_scales(model, layer_decay_rate)
        by_name = {name: scales.get(id(p), 1.0) for name, p in model.named_parameters()}
        kwargs["lr_factor_func"] = by_name.__getitem__
    return get_default_optimizer_params(model, **kwargs)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that ``SOLVER`` describes; see ``add_diffusion_config``."""
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    params = get_optimizer_params(
        model,
        solver.LAYER_DECAY_RATE,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "foreach": True}
    kind, own = {
        "SGD": (torch.optim.SGD, {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}),
        "ADAMW": (torch.optim.AdamW, {"betas": solver.BETAS}),
    }[solver.OPTIMIZER]
    if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, kind)(params, **common, **own)
    optimizer = kind(params, **common, **own)

    def clip_gradients(*_: Any) -> None:  # after a gradient scaler's unscaling
        nn.utils.clip_grad_norm_(model.parameters(), clip.CLIP_VALUE, clip.NORM_TYPE)

    optimizer.register_step_pre_hook(clip_gradients)
    return optimizer
