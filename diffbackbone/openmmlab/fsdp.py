"""Fully sharded training (FSDP) with MMEngine's FlexibleRunner."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.models.guided_diffusion import Block


@FUNCTIONS.register_module()
def wrap_blocks(
    module: nn.Module, recurse: bool, nonwrapped_numel: int, min_params: int = 2_000_000
) -> bool:
    """FSDP's auto-wrap policy: wrap each block of the U-Net and each large layer of a head.

    Heads can't be wrapped: MMSegmentation calls their ``loss`` and ``predict``, and FSDP gathers
    weights in ``forward`` only. Torch's attention doesn't call its output projection, a subclass.
    """
    if recurse:
        return not isinstance(module, Block)
    large = type(module) in (nn.Conv2d, nn.Linear) and nonwrapped_numel >= min_params
    return isinstance(module, Block) or large


@STRATEGIES.register_module()
class WholeFSDPStrategy(FSDPStrategy):
    """MMEngine's FSDP with exact resuming, clipping by the norm of all shards, and on CPUs too.

    Checkpoints are single files with the whole model's weights. MMEngine 0.10 can't resume FSDP
    with torch 2.1 and later, and clips each process's shards by their own norm.
    """

    def __init__(self, *, state_dict_cfg: str | dict[str, Any] = "full", **kwargs: Any) -> None:
        super().__init__(state_dict_cfg=state_dict_cfg, **kwargs)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        self.model_wrapper = wrapper = copy.deepcopy(self.model_wrapper or {})
        sharding = wrapper.get("sharding_strategy", "FULL_SHARD")
        mode = getattr(model, "test_cfg", {}).get("mode")
        if mode == "slide" and sharding in ("FULL_SHARD", "HYBRID_SHARD"):
            raise ValueError(  # processes would wait for each other forever
                f"sharding_strategy {sharding} gathers weights for each window of an image, and "
                "processes evaluate different numbers of windows: use SHARD_GRAD_OP, or "
                "model.test_cfg.mode=whole"
            )
        for module in model.modules():
            if isinstance(module, DiffusionBackbone):
                module.save_frozen = True  # FSDP needs all weights in its state dicts
        if get_device() == "cpu":
            model = revert_sync_batchnorm(model)
            wrapper["device_id"] = torch.device("cpu")
            # offloading frees the source tensors, which from CPU to CPU are not copied
            self.state_dict_config.offload_to_cpu = False
            self.optim_state_dict_config.offload_to_cpu = False
        return super()._wrap_model(model)

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        """Build the optimizer's wrapper, which clips gradients by the norm over all processes."""
        built = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(built, "clip_func", None) is torch.nn.utils.clip_grad_norm_:
            built.clip_func = lambda params, *args, **kwargs: model.clip_grad_norm_(*args, **kwargs)
        return built

    def optim_state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state by parameter names on the first process, {} on others."""
        whole = FullyShardedDataParallel.optim_state_dict(self.model, self.optim_wrapper.optimizer)
        own = self.optim_wrapper.state_dict()  # with a loss scaler's, say
        return {**{key: own[key] for key in own if key not in ("state", "param_groups")}, **whole}

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this process's part of the optimizer's state."""
        mine = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model,
            optim=self.optim_wrapper.optimizer,
            optim_state_dict={key: state_dict[key] for key in ("state", "param_groups")},
        )
        self.optim_wrapper.load_state_dict({**state_dict, **mine})

    def load_checkpoint(self, filename: str, *, map_location: Any = "cpu", **kwargs: Any) -> dict:
        """Read a checkpoint into the CPU's memory: it may be too large for a GPU."""
        where = "cpu" if map_location == "default" else map_location
        return super().load_checkpoint(filename, map_location=where, **kwargs)

    def load_model_state_dict(
        self, state_dict: dict[str, Any], *, strict: bool = False, **kwargs: Any
    ) -> None:
        """Load this process's part of the weights; warn of missing and unexpected ones."""
        missing, unexpected = self.model.load_state_dict(state_dict, strict=strict)
        if missing or unexpected:
            print_log(
                f"the checkpoint lacks {len(missing)} weights {missing[:3]} and also has "
                f"{len(unexpected)} {unexpected[:3]}",
                logger="current",
                level=logging.WARNING,
            )
