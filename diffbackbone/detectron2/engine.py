"""Training with YAML configs: Detectron2's default trainer plus exact resuming, bfloat16 and CPUs.

The stream of images, their augmentation and the model's random numbers depend on the seed and the
iteration alone, so a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from detectron2 import evaluation
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from diffbackbone.detectron2.checkpoint import Checkpointer, CheckpointHook
from diffbackbone.detectron2.datasets import (
    build_mapper,
    build_train_loader,
    check_classes,
    load_dicts,
    loader_settings,
)
from diffbackbone.detectron2.solver import build_optimizer
from diffbackbone.utils import seed_everything

logger = logging.getLogger(__name__)

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class SeedIterations(HookBase):
    """Seed all generators before each iteration by the seed, the iteration and the rank."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        """Seed the generators."""
        seed_everything(self.seed, self.trainer.iter, 1, comm.get_rank())

    def state_dict(self) -> dict[str, int]:
        """Return the seed, for checkpoints."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Take a checkpoint's seed."""
        self.seed = state_dict["seed"]


def make_step_trainer(
    model: nn.Module,
    data_loader: Any,
    optimizer: torch.optim.Optimizer,
    amp: bool = False,
    dtype: str = "auto",
) -> SimpleTrainer:
    """Build Detectron2's trainer of single steps, with ``amp`` in mixed precision on a GPU.

    ``dtype`` is ``"auto"`` (bfloat16 where the GPU supports it), ``"bfloat16"`` or ``"float16"``.
    """
    if amp and not torch.cuda.is_available():
        logger.warning("mixed precision needs a GPU; training in float32")
        amp = False
    if not amp:
        return SimpleTrainer(model, data_loader, optimizer)
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    return AMPTrainer(
        model, data_loader, optimizer, grad_scaler=scaler, precision=AMP_DTYPES[dtype]
    )


def wrap_distributed(model: nn.Module, **options: Any) -> nn.Module:
    """Wrap a model for several processes on GPUs or CPUs; see ``create_ddp_model``."""
    device_ids = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
    return create_ddp_model(model, device_ids=device_ids, **options)


class Trainer(DefaultTrainer):
    """Detectron2's default trainer, for configs with the keys of ``add_diffusion_config``."""

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._seeding = SeedIterations(seed)
        self._records = loader_settings(cfg, seed)["dataset"]
        for name in cfg.DATASETS.TEST:
            load_dicts(name)

        seed_everything(seed)
        model = self.build_model(cfg)
        check_classes(model, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        optimizer = self.build_optimizer(cfg, model)
        model = wrap_distributed(model, broadcast_buffers=False)
        amp = cfg.SOLVER.AMP
        self._trainer = make_step_trainer(model, None, optimizer, amp.ENABLED, amp.DTYPE)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Build Detectron2's hooks, with the seeding first and evaluation with augmentation."""
        solver = self.cfg.SOLVER
        keep = solver.CHECKPOINT_KEEP or None
        writer = CheckpointHook(self.checkpointer, solver.CHECKPOINT_PERIOD, max_to_keep=keep)
        hooks = super().build_hooks()
        hooks = [writer if isinstance(hook, PeriodicCheckpointer) else hook for hook in hooks]
        if self.cfg.TEST.AUG.ENABLED:
            GeneralizedRCNNWithTTA(self.cfg, self.model)  # fails now where it would at the end

            def test_augmented() -> dict[str, Any]:
                results = self.test_with_TTA(self.cfg, self.model)
                self._last_eval_results.update(results)
                return results

            # after the plain evaluation, before the results are written
            last = max(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
            hooks.insert(last + 1, EvalHook(0, test_augmented))
        return [self._seeding, *hooks]

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:  # noqa: N802
        """Evaluate with ``TEST.AUG``; the results' names get the suffix ``_TTA``."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": values for name, values in results.items()}

    def train(self) -> Any:
        """Train from ``start_iter`` to the end."""
        settings = loader_settings(self.cfg, self._seeding.seed, self._records)
        self._trainer.reset_data_loader(
            lambda: build_train_loader(start_iter=self.start_iter, **settings)
        )
        return super().train()

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`diffbackbone.detectron2.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> torch.utils.data.DataLoader:
        """Build a loader that begins at the first iteration, for Detectron2's hooks."""
        return build_train_loader(**loader_settings(cfg, max(cfg.SEED, 0)))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> torch.utils.data.DataLoader:
        """Build Detectron2's loader with the mapper of this package."""
        return build_detection_test_loader(cfg, dataset_name, mapper=build_mapper(cfg, False))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> evaluation.DatasetEvaluator:
        """Build the evaluators for the dataset's ``evaluator_type``; COCO's for unknown ones."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        without_folder = {
            "cityscapes_instance": evaluation.CityscapesInstanceEvaluator,
            "cityscapes_sem_seg": evaluation.CityscapesSemSegEvaluator,
            "pascal_voc": evaluation.PascalVOCDetectionEvaluator,
        }
        if kind in without_folder:
            return without_folder[kind](dataset_name)
        if kind == "lvis":
            return evaluation.LVISEvaluator(dataset_name, output_dir=folder)
        evaluators = []
        if kind in ("sem_seg", "coco_panoptic_seg"):
            evaluators.append(evaluation.SemSegEvaluator(dataset_name, output_dir=folder))
        if kind != "sem_seg":
            evaluators.append(evaluation.COCOEvaluator(dataset_name, output_dir=folder))
        if kind == "coco_panoptic_seg" and importlib.util.find_spec("panopticapi"):
            evaluators.append(evaluation.COCOPanopticEvaluator(dataset_name, folder))
        elif kind == "coco_panoptic_seg":
            logger.warning("panoptic quality needs github.com/cocodataset/panopticapi")
        return evaluation.DatasetEvaluators(evaluators)
