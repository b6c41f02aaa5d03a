"""Fully sharded training (FSDP) with MMEngine's FlexibleRunner.

:class:`WholeFSDPStrategy` replaces MMEngine's ``FSDPStrategy`` in configs. Its checkpoints are
single files with the whole model's weights, and resuming from them is exact.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from diffbackbone import compat

compat.apply_mmengine_repairs()

import torch  # noqa: E402
from mmengine._strategy import FSDPStrategy  # noqa: E402
from mmengine.device import get_device  # noqa: E402
from mmengine.logging import print_log  # noqa: E402
from mmengine.registry import FUNCTIONS, STRATEGIES  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy  # noqa: E402

from diffbackbone.backbone import DiffusionBackbone  # noqa: E402
from diffbackbone.models.guided_diffusion import Block  # noqa: E402


@FUNCTIONS.register_module()
def wrap_blocks(
    module: nn.Module, recurse: bool, nonwrapped_numel: int, min_params: int = 2_000_000
) -> bool:
    """What FSDP gathers at a time: a block of the U-Net, or a large layer of a head.

    Heads themselves are no such units: MMSegmentation calls their ``loss`` and ``predict``, and
    FSDP gathers weights for ``forward`` alone. Subclasses of layers are left alone, since torch's
    attention computes with the weights of its own by itself.

    Args:
        module: The module in question.
        recurse: Whether it is about the modules inside.
        nonwrapped_numel: How many parameters in it are in no unit yet.
        min_params: Parameters from which on a convolution or a linear layer is large.
    """
    if recurse:
        return not isinstance(module, Block)
    large = type(module) in (nn.Conv2d, nn.Linear) and nonwrapped_numel >= min_params
    return isinstance(module, Block) or large


@STRATEGIES.register_module()
class WholeFSDPStrategy(FSDPStrategy):
    """MMEngine's FSDP with whole checkpoints, exact resuming, clipping by the norm of all shards.

    What it changes: MMEngine 0.10 can't resume FSDP with torch 2.1 and later, whose functions take
    their arguments in another order; it clips each process's shards by their own norm; it ignores
    weights that a checkpoint lacks; and it needs CUDA.

    Args:
        model_wrapper: Arguments of MMEngine's ``MMFullyShardedDataParallel``.
        state_dict_cfg: See MMEngine's ``FSDPStrategy``.
        **kwargs: See MMEngine's ``FSDPStrategy``.

    Raises:
        ValueError: There is one process without a launcher.
    """

    def __init__(
        self,
        *,
        model_wrapper: Mapping[str, Any] | None = None,
        state_dict_cfg: str | dict[str, Any] = "full",
        **kwargs: Any,
    ) -> None:
        if (kwargs.get("env_kwargs") or {}).get("launcher") in (None, "none"):
            raise ValueError(
                "FSDP needs a launcher, even on one GPU: torchrun --nproc_per_node=N "
                "tools/mmseg_train.py CONFIG --launcher pytorch, or --launcher slurm under srun; "
                "without a launcher, use the config without _fsdp"
            )
        super().__init__(
            model_wrapper=dict(model_wrapper or {}), state_dict_cfg=state_dict_cfg, **kwargs
        )

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        wrapper = {"type": "MMFullyShardedDataParallel", **copy.deepcopy(self.model_wrapper)}
        _check_evaluation(model, wrapper.get("sharding_strategy"))
        for module in model.modules():
            if isinstance(module, DiffusionBackbone):
                module.save_frozen = True  # FSDP needs all weights in its state dicts
        if get_device() == "cpu":
            model = compat.without_sync_batchnorm(model)
            wrapper["device_id"] = torch.device("cpu")
            # torch "offloads" by freeing what it has copied, and from CPU to CPU copies nothing
            self.state_dict_config.offload_to_cpu = False
            self.optim_state_dict_config.offload_to_cpu = False
        self.model_wrapper = wrapper
        return super()._wrap_model(model)

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        """Build the optimizer's wrapper, which clips gradients by the norm over all processes."""
        built = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(built, "clip_func", None) is torch.nn.utils.clip_grad_norm_:
            built.clip_func = _clip_by(model)
        return built

    def optim_state_dict(self) -> dict[str, Any]:
        """The optimizer's state by parameter names, on the first process; {} on others."""
        whole = FullyShardedDataParallel.optim_state_dict(self.model, self.optim_wrapper.optimizer)
        own = self.optim_wrapper.state_dict()  # with a loss scaler's, say
        return {**{key: own[key] for key in own if key not in ("state", "param_groups")}, **whole}

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of the optimizer's state.

        Raises:
            ValueError: The state is that of a run without FSDP.
        """
        keys = ("state", "param_groups")
        if any(
            not isinstance(name, str) for g in state_dict["param_groups"] for name in g["params"]
        ):
            raise ValueError(
                "this checkpoint's optimizer state is that of a run without FSDP, which has no "
                "names: go on with that run's config, or start a new run with "
                "--cfg-options load_from=CHECKPOINT in place of --resume"
            )
        mine = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model,
            optim=self.optim_wrapper.optimizer,
            optim_state_dict={key: state_dict[key] for key in keys},
        )
        self.optim_wrapper.load_state_dict({**state_dict, **mine})

    def load_checkpoint(self, filename: str, *, map_location: Any = "cpu", **kwargs: Any) -> dict:
        """Read a checkpoint into the CPU's memory: it may be too large for a card."""
        where = "cpu" if map_location == "default" else map_location
        return super().load_checkpoint(filename, map_location=where, **kwargs)

    def load_model_state_dict(
        self, state_dict: dict[str, Any], *, strict: bool = False, **kwargs: Any
    ) -> None:
        """Take this process's part of the weights; says which are missing or left over."""
        _say_differences(self.model.load_state_dict(state_dict, strict=strict))


def _say_differences(found: Any) -> None:
    """Warn of weights that a checkpoint lacks, and of those that are left over."""
    for what, names in (
        ("lacks", found.missing_keys),
        ("has no use for", found.unexpected_keys),
    ):
        if names:
            print_log(
                f"the checkpoint {what} {len(names)} of the model's weights, "
                f"such as {', '.join(names[:3])}",
                logger="current",
                level=30,
            )


def _check_evaluation(model: nn.Module, sharding: str | ShardingStrategy | None) -> None:
    """Make sure that no process waits for another one that is done with its image.

    Raises:
        ValueError: Weights would be gathered for each crop of an image, whose number differs.
    """
    name = getattr(sharding, "name", sharding) or "FULL_SHARD"
    mode = (getattr(model, "test_cfg", None) or {}).get("mode")
    if mode == "slide" and name in ("FULL_SHARD", "HYBRID_SHARD"):
        raise ValueError(
            f"sharding_strategy {name} gathers weights for each window of a sliding-window "
            "evaluation, and processes whose images have more windows would wait for ever: take "
            "SHARD_GRAD_OP, or model.test_cfg.mode=whole for the evaluation during training"
        )


def _clip_by(model: Any) -> Callable[..., Tensor]:
    def clip_grad_norm(params: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        return model.clip_grad_norm_(max_norm, norm_type)

    return clip_grad_norm
