"""Weights, gradients and optimizer state spread over several cards, by MMEngine's FlexibleRunner.

MMEngine drives torch's FSDP and DeepSpeed. :class:`WholeFSDPStrategy` and
:class:`WholeDeepSpeedStrategy` take the places of its strategies, in configs by name. Their
checkpoints resume exactly, and have a file with the names and shapes of the whole model's weights.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffbackbone import compat

compat.apply_mmengine_repairs()

import torch  # noqa: E402
from mmengine._strategy import DeepSpeedStrategy, FSDPStrategy  # noqa: E402
from mmengine.device import get_device  # noqa: E402
from mmengine.dist import is_main_process  # noqa: E402
from mmengine.logging import print_log  # noqa: E402
from mmengine.registry import FUNCTIONS, STRATEGIES  # noqa: E402
from mmengine.runner import checkpoint as checkpoints  # noqa: E402
from mmengine.runner import save_checkpoint, weights_to_cpu  # noqa: E402
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


def _check_launcher(env_kwargs: Mapping[str, Any] | None, what: str, suffix: str) -> None:
    if (env_kwargs or {}).get("launcher") in (None, "none"):
        raise ValueError(
            f"{what} needs a launcher, also on one card: torchrun --nproc_per_node=N "
            "tools/mmseg_train.py CONFIG --launcher pytorch, or --launcher slurm under srun; "
            f"without one, take the config without {suffix}"
        )


# --------------------------------------------------------------------------------------------------
# FSDP


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
        _check_launcher(kwargs.get("env_kwargs"), "FSDP", "_fsdp")
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


# --------------------------------------------------------------------------------------------------
# DeepSpeed


_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_NEEDED_BY_MMENGINE = "deepspeed.runtime.fp16.onebit"


@STRATEGIES.register_module()
class WholeDeepSpeedStrategy(DeepSpeedStrategy):
    """MMEngine's DeepSpeed, which also writes the whole model's weights.

    A checkpoint is DeepSpeed's folder, which a run resumes from, with one more file in it:
    ``weights.pth``, for evaluation and for other runs to load.

    Args:
        zero_optimization: DeepSpeed's settings; ``stage`` up to 2.
        **kwargs: See MMEngine's ``DeepSpeedStrategy``.

    Raises:
        ImportError: DeepSpeed is not installed, or too new for MMEngine.
        ValueError: Stage 3 is asked for; or there is one process without a launcher.
    """

    def __init__(self, *, zero_optimization: dict | None = None, **kwargs: Any) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ImportError("this config needs DeepSpeed: pip install 'deepspeed<0.19'")
        if importlib.util.find_spec(_NEEDED_BY_MMENGINE) is None:
            raise ImportError(
                f"MMEngine 0.10 imports {_NEEDED_BY_MMENGINE}, which DeepSpeed 0.19 doesn't have: "
                "install an older one (pip install 'deepspeed<0.19'), or take the config with _fsdp"
            )
        stage = (zero_optimization or {}).get("stage", 0)
        if stage not in (0, 1, 2):
            raise ValueError(
                f"zero_optimization.stage must be 0, 1 or 2, got {stage!r}: stage 3 gathers "
                "weights for each layer's own forward, and the U-Net's attention computes with its "
                "layers' weights itself; the config with _fsdp can spread weights"
            )
        _check_launcher(kwargs.get("env_kwargs"), "DeepSpeed", "_deepspeed")
        super().__init__(zero_optimization=zero_optimization, **kwargs)

    def prepare(self, model: Any, *, dispatch_kwargs: dict | None = None, **kwargs: Any) -> Any:
        """See MMEngine. Its runner tells only the strategy of its own name the batch size."""
        batch = (dispatch_kwargs or {}).get("train_micro_batch_size_per_gpu", 1)
        self.config.setdefault("train_micro_batch_size_per_gpu", batch)
        return super().prepare(model, dispatch_kwargs=dispatch_kwargs, **kwargs)

    def load_checkpoint(self, filename: str, *, strict: bool = False, **kwargs: Any) -> dict:
        """Load weights from a file of any run, or from ``weights.pth`` of DeepSpeed's folder.

        Raises:
            ValueError: The folder has none.
        """
        path = os.path.join(filename, "weights.pth") if os.path.isdir(filename) else filename
        if path != filename and not os.path.isfile(path):
            raise ValueError(f"{filename} has no weights.pth, which this strategy writes into it")
        checkpoint = checkpoints._load_checkpoint(path, map_location="cpu")
        state = checkpoint.get("state_dict", checkpoint)
        _say_differences(self.model.module.load_state_dict(state, strict=strict))
        if refresh := getattr(self.model.optimizer, "refresh_fp32_params", None):
            refresh()  # it keeps its own part of the weights
        return checkpoint

    def resume(self, filename: str, **kwargs: Any) -> dict:
        """See MMEngine. What DeepSpeed pickles is read as weights and its own few types."""
        with _only_weights():
            return super().resume(filename, **kwargs)

    def save_checkpoint(self, filename: str, **kwargs: Any) -> None:
        """Write DeepSpeed's folder, and the whole weights into it."""
        super().save_checkpoint(filename, **kwargs)
        if is_main_process() and os.path.isdir(filename):
            weights = weights_to_cpu(self.model.module.state_dict())
            meta = dict((kwargs.get("extra_ckpt") or {}).get("meta") or {})
            save_checkpoint(
                {"state_dict": weights, "meta": meta}, os.path.join(filename, "weights.pth")
            )


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """DeepSpeed asks ``torch.load`` to unpickle anything; here it gets nothing but data."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    types: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    types.append((dict, "mmengine.config.config.ConfigDict"))  # of the optimizer's settings
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(types):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
