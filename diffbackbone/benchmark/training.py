"""A framework's training steps, timed in parts.

Model, optimizer and the step itself are the framework's own, built from this project's configs;
the batch is always the same, so nothing waits for data.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffbackbone
from diffbackbone.benchmark import worker

CONFIGS = Path(diffbackbone.__file__).parents[1] / "configs"
OBJECTS = 8
"""In an image; COCO has 7.3 on average."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What a row measures."""

    model: str  # "upernet" or "mask_rcnn"
    mode: str  # "frozen" or "finetuned"
    feedback: str  # "none" or "bottleneck"
    size: int  # height and width in pixels
    batch: int
    dtype: str
    activation_checkpointing: str  # "config", "on" or "off"

    def __str__(self) -> str:
        feedback = "" if self.feedback == "none" else f" {self.feedback}"
        text = f"{self.model} {self.mode}{feedback} {self.size} px x {self.batch} {self.dtype}"
        recompute = self.activation_checkpointing
        return text if recompute == "config" else f"{text} checkpointing {recompute}"


class Stopwatch:
    """Times the parts of a training step; on a GPU by events, which don't delay it.

    Args:
        backbone: The ``DiffusionBackbone`` in the model.
        optimizer: Of the model.
        device: Where they are.
    """

    def __init__(self, backbone: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        self.device = device
        self._marks: dict[str, list[Any]] = collections.defaultdict(list)
        # Either is called once for a batch of images of one size.
        owner, name = backbone.unet, "forward_features"
        if backbone.feedback is not None:
            owner, name = backbone.feedback, "forward"
        setattr(owner, name, self._timed(getattr(owner, name)))
        optimizer.register_step_pre_hook(lambda *_: self._mark("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self._mark("optimizer"))

    def _mark(self, what: str) -> None:
        if self.device == "cpu":
            mark: Any = time.perf_counter()
        else:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks[what].append(mark)

    def _timed(self, function: Callable[..., dict[int, Tensor]]) -> Any:
        def call(*args: Any, **kwargs: Any) -> dict[int, Tensor]:
            self._mark("forward")
            taps = function(*args, **kwargs)
            self._mark("forward")
            for tap in taps.values():
                if tap.requires_grad:
                    tap.register_hook(self._backward)
            return taps

        return call

    def _backward(self, _: Tensor) -> None:
        # Autograd runs last what ran first, so heads and projections are done by now.
        if not self._marks["backward"]:
            self._mark("backward")
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._mark("backward"))  # at the end of backward

    def time(self, step: Callable[[], Any]) -> dict[str, float]:
        """Return the seconds of a step, and of ``forward``, ``backward``, ``optimizer`` in it."""
        self._marks.clear()
        worker.synchronize(self.device)
        start = time.perf_counter()
        step()
        worker.synchronize(self.device)
        seconds = {"step": time.perf_counter() - start}
        for what in ("forward", "backward", "optimizer"):
            marks = self._marks[what]
            seconds[what] = sum(self._between(*pair) for pair in zip(marks[::2], marks[1::2]))
        return seconds

    def _between(self, start: Any, end: Any) -> float:
        return end - start if self.device == "cpu" else start.elapsed_time(end) / 1000


# --------------------------------------------------------------------------------------------------
# frameworks


@dataclasses.dataclass
class Framework:
    """A model in training."""

    case: Case
    device: str
    unet: str  # preset
    checkpoint: str | None
    head_channels: int | None  # None for the config's
    model: nn.Module = dataclasses.field(init=False)
    optimizer: torch.optim.Optimizer = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.recompute = {"on": True, "off": False}.get(self.case.activation_checkpointing)
        self.random = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self._build()
        self.model.train()
        kind = diffbackbone.DiffusionBackbone
        (self.backbone,) = (m for m in self.model.modules() if isinstance(m, kind))
        allocate_state(self.optimizer)
        self.stopwatch = Stopwatch(self.backbone, self.optimizer, self.device)

    @staticmethod
    def prepare() -> None:
        """Import the framework."""

    def _build(self) -> None:
        """Build the model, its optimizer and a batch."""
        raise NotImplementedError

    def update(self) -> None:
        """Run a step, as the framework does it."""
        raise NotImplementedError

    def _image(self) -> Tensor:
        """Return pixels (3, size, size) of 0 to 255."""
        shape = (3, self.case.size, self.case.size)
        return torch.randint(0, 256, shape, generator=self.random, dtype=torch.uint8)


class UperNet(Framework):
    """MMSegmentation's, in the way of MMEngine's runner for a single process."""

    @staticmethod
    def prepare() -> None:
        """Import MMSegmentation."""
        import diffbackbone.mmseg  # noqa: F401, I001  checks and repairs what mmseg needs
        from mmseg.utils import register_all_modules

        register_all_modules(init_default_scope=False)

    def config(self) -> Any:
        """Return the config with the case's options."""
        from mmengine.config import Config

        name = "gd_t90_b33-30-27-24" if self.case.feedback == "none" else "difffeed"
        cfg = Config.fromfile(str(CONFIGS / "mmseg" / f"upernet_{name}_ade20k.py"))
        weights = self.checkpoint and {"type": "Pretrained", "checkpoint": self.checkpoint}
        backbone = cfg.model.backbone
        backbone.update(unet=self.unet, freeze=self.case.mode == "frozen", init_cfg=weights)
        if self.recompute is not None:
            backbone.activation_checkpointing = self.recompute
        if width := self.head_channels:
            backbone.out_channels = width
            levels = len(cfg.model.decode_head.in_channels)
            cfg.model.decode_head.update(channels=width, in_channels=[width] * levels)
            cfg.model.auxiliary_head.update(channels=width, in_channels=width)
        cfg.model.data_preprocessor.size = (self.case.size, self.case.size)
        if self.case.dtype != "float32":  # as --amp of MMSegmentation's tools/train.py
            amp = {"type": "AmpOptimWrapper", "loss_scale": "dynamic", "dtype": self.case.dtype}
            cfg.optim_wrapper.update(amp)
        return cfg

    def _build(self) -> None:
        from mmengine import DefaultScope
        from mmengine.model import revert_sync_batchnorm
        from mmengine.optim import build_optim_wrapper
        from mmseg.registry import MODELS

        cfg = self.config()
        torch.backends.cudnn.benchmark = cfg.env_cfg.cudnn_benchmark
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
            model.init_weights()
            self.model = revert_sync_batchnorm(model).to(self.device)
            self.wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        self.optimizer = self.wrapper.optimizer
        samples = [self._sample() for _ in range(self.case.batch)]
        self.batch = {"inputs": [self._image() for _ in samples], "data_samples": samples}

    def _sample(self) -> Any:
        """Return a label map of patches, some of them ignored."""
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        shape = (self.case.size, self.case.size)
        classes = self.model.decode_head.num_classes
        labels = torch.randint(0, classes, (8, 8), generator=self.random)
        labels[0, ::4] = 255
        labels = nn.functional.interpolate(labels[None, None].float(), shape)[0].long()
        sample = SegDataSample(metainfo={"img_shape": shape, "ori_shape": shape})
        sample.gt_sem_seg = PixelData(data=labels)
        return sample

    def update(self) -> None:
        """Run a step."""
        self.model.train_step(self.batch, self.wrapper)


class MaskRCNN(Framework):
    """Detectron2's, with this project's trainer."""

    @staticmethod
    def prepare() -> None:
        """Import Detectron2."""
        import diffbackbone.detectron2_engine  # noqa: F401

    def config(self) -> Any:
        """Return the config with the case's options."""
        from detectron2.config import get_cfg

        from diffbackbone.detectron2 import add_diffusion_config

        name = "gd_t75_b24" if self.case.feedback == "none" else "difffeed"
        cfg = get_cfg()
        add_diffusion_config(cfg)
        cfg.merge_from_file(str(CONFIGS / "detectron2" / f"mask_rcnn_{name}.yaml"))
        model, diffusion = cfg.MODEL, cfg.MODEL.DIFFUSION
        model.DEVICE = self.device
        diffusion.UNET, diffusion.CHECKPOINT = self.unet, self.checkpoint or ""
        diffusion.FREEZE = self.case.mode == "frozen"
        if self.recompute is not None:
            diffusion.ACTIVATION_CHECKPOINTING = self.recompute
        if self.case.dtype != "float32":
            cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, self.case.dtype
        if width := self.head_channels:
            model.FPN.OUT_CHANNELS = model.ROI_MASK_HEAD.CONV_DIM = width
            model.ROI_BOX_HEAD.CONV_DIM = model.ROI_BOX_HEAD.FC_DIM = width
        return cfg

    def _build(self) -> None:
        from diffbackbone.detectron2_engine import Trainer, make_step_trainer

        cfg = self.config()
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        self.model = Trainer.build_model(cfg).train()
        self.optimizer = Trainer.build_optimizer(cfg, self.model)
        classes, amp = cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.SOLVER.AMP
        batches = itertools.repeat([self._sample(classes) for _ in range(self.case.batch)])
        self.trainer = make_step_trainer(
            self.model, batches, self.optimizer, amp.ENABLED, amp.DTYPE
        )

    def _sample(self, classes: int) -> dict[str, Any]:
        """Return an image with octagons of 1/16 to 3/4 of its side."""
        from detectron2.structures import Boxes, Instances, PolygonMasks

        size = self.case.size
        sides = size * 12 ** torch.rand(OBJECTS, 2, generator=self.random) / 16
        centers = sides / 2 + (size - sides) * torch.rand(OBJECTS, 2, generator=self.random)
        angles = torch.arange(8) * math.pi / 4
        unit = torch.stack([angles.cos(), angles.sin()], dim=1)
        polygons = centers[:, None] + sides[:, None] / 2 * unit
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.cat([centers - sides / 2, centers + sides / 2], dim=1))
        instances.gt_classes = torch.randint(0, classes, (OBJECTS,), generator=self.random)
        instances.gt_masks = PolygonMasks([[polygon.flatten().numpy()] for polygon in polygons])
        return {"image": self._image(), "height": size, "width": size, "instances": instances}

    def update(self) -> None:
        """Run a step."""
        from detectron2.utils.events import EventStorage

        with EventStorage():
            self.trainer.run_step()


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer allocate its state and leave the weights as they are.

    It would do so at the end of the first step, which would take less memory than all others.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # weight decay is multiplied by it too
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


FRAMEWORKS: dict[str, type[Framework]] = {"upernet": UperNet, "mask_rcnn": MaskRCNN}


class Training:
    """Answers a worker's calls: builds one model and times its steps."""

    framework: Framework
    baseline = 0

    def machine(self, device: str) -> dict[str, Any]:
        """Describe the machine."""
        return worker.describe_machine(device)

    def load(self, case: Case, device: str, **options: Any) -> tuple[int, int, bool]:
        """Build the model.

        Returns:
            Its parameters, those that are trained, and whether the U-Net recomputes blocks.
        """
        kind = FRAMEWORKS[case.model]
        kind.prepare()
        worker.reset_peak(device)
        self.baseline = worker.peak_bytes(device) if device == "cpu" else 0
        self.framework = kind(case, device, **options)
        worker.reset_peak(device)
        sizes = [(p.numel(), p.requires_grad) for p in self.framework.model.parameters()]
        recomputes = self.framework.backbone.unet.activation_checkpointing
        return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained), recomputes

    def first(self) -> int:
        """Run the first step; return its floating-point operations."""
        flops = worker.count_flops(self.time)
        worker.reset_peak(self.framework.device)
        return flops

    def time(self) -> dict[str, float]:
        """Run a step; see :meth:`Stopwatch.time`."""
        return self.framework.stopwatch.time(self.framework.update)

    def peak(self) -> tuple[int, int | None]:
        """Return the peak bytes of the timed steps, and what torch reserved on a GPU."""
        device = self.framework.device
        reserved = None if device == "cpu" else torch.cuda.max_memory_reserved()
        return worker.peak_bytes(device) - self.baseline, reserved
