"""What runs in the processes of `tools/benchmark_steps.py`: a framework's training steps.

Model, optimizer and the step itself are the framework's own, made from this project's configs; the
batch is always the same, so that nothing waits for data.
"""

from __future__ import annotations

import collections
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import _common
import torch
from _benchmark_worker import Worker, main, peak_bytes, reset_peak, synchronize
from torch import Tensor, nn

_common.add_root()

OBJECTS = 8
"""In an image; COCO has 7.3 on average."""


class Stopwatch:
    """Tells apart what a step's time went into; see ``tools/benchmark_steps.py``.

    Args:
        backbone: The ``DiffusionBackbone`` in the model.
        optimizer: Of the model.
        device: Where they are.
    """

    def __init__(self, backbone: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        self.device = device
        self._marks: dict[str, list[Any]] = collections.defaultdict(list)
        # either is called once for a batch of images of one size
        owner, name = backbone.unet, "forward_features"
        if backbone.feedback is not None:
            owner, name = backbone.feedback, "forward"
        setattr(owner, name, self._timed(getattr(owner, name)))
        optimizer.register_step_pre_hook(lambda *_: self._mark("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self._mark("optimizer"))

    def _mark(self, what: str) -> None:
        if self.device == "cpu":
            self._marks[what].append(time.perf_counter())
        else:  # a GPU goes on meanwhile
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[what].append(event)

    def _timed(
        self, function: Callable[..., dict[int, Tensor]]
    ) -> Callable[..., dict[int, Tensor]]:
        """The function that gives the taps, with marks before and after it and its backward."""

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
        """The first of the taps' gradients is there; the engine calls back when all is done."""
        if not self._marks["backward"]:
            self._mark("backward")
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._mark("backward"))

    def time(self, step: Callable[[], Any]) -> dict[str, float]:
        """Seconds of a step: ``"step"``, and of it ``"forward"``, ``"backward"``, ``"optimizer"``.

        The U-Net's forward and backward pass are meant. What has not run took no time.
        """
        self._marks.clear()
        synchronize(self.device)
        start = time.perf_counter()
        step()
        synchronize(self.device)
        seconds = {"step": time.perf_counter() - start}
        for what in ("forward", "backward", "optimizer"):
            marks = self._marks[what]
            pairs = zip(marks[::2], marks[1::2])
            seconds[what] = sum(self._between(*pair) for pair in pairs)
        return seconds

    def _between(self, start: Any, end: Any) -> float:
        return end - start if self.device == "cpu" else start.elapsed_time(end) / 1000


# --------------------------------------------------------------------------------------------------
# frameworks


class Training:
    """A model in training.

    Args:
        job: The case; see ``tools/benchmark_steps.py``.

    Attributes:
        model: The whole model.
        optimizer: Its optimizer.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, job: Mapping[str, Any]) -> None:
        from diffbackbone.backbone import DiffusionBackbone

        self.job = job
        torch.manual_seed(0)
        self.random = torch.Generator().manual_seed(0)
        self.build()
        self.model.train()
        (self.backbone,) = (m for m in self.model.modules() if isinstance(m, DiffusionBackbone))
        allocate_state(self.optimizer)
        self.stopwatch = Stopwatch(self.backbone, self.optimizer, job["device"])

    @staticmethod
    def prepare() -> None:
        """Import the framework."""
        raise NotImplementedError

    def build(self) -> None:
        """Build the model, its optimizer and a batch."""
        raise NotImplementedError

    def update(self) -> None:
        """A step, as the framework does it."""
        raise NotImplementedError

    def image(self) -> Tensor:
        """Pixels (3, size, size) of 0 to 255."""
        size = self.job["size"]
        return torch.randint(0, 256, (3, size, size), generator=self.random, dtype=torch.uint8)


class UperNet(Training):
    """MMSegmentation's, in the way of MMEngine's runner for a single process."""

    @staticmethod
    def prepare() -> None:
        """Import MMSegmentation."""
        import _mmseg

        _mmseg.prepare()
        from mmseg.utils import register_all_modules

        import diffbackbone.mmseg  # noqa: F401

        register_all_modules(init_default_scope=False)

    def config(self) -> Any:
        """The config, with what the case asks for."""
        import _mmseg
        from mmengine.config import Config

        job = self.job
        cfg = Config.fromfile(_mmseg.find_config(job["config"]))
        weights = job["checkpoint"] and {"type": "Pretrained", "checkpoint": job["checkpoint"]}
        backbone = {"unet": job["unet"], "freeze": job["mode"] == "frozen", "init_cfg": weights}
        if job["activation_checkpointing"] != "config":
            backbone["activation_checkpointing"] = job["activation_checkpointing"] == "on"
        if width := job["head_channels"]:
            backbone["out_channels"] = width
            levels = len(cfg.model.decode_head.in_channels)
            cfg.model.decode_head.update(channels=width, in_channels=[width] * levels)
            cfg.model.auxiliary_head.update(channels=width, in_channels=width)
        cfg.model.backbone.update(backbone)
        cfg.model.data_preprocessor.size = (job["size"], job["size"])
        if job["dtype"] != "float32":  # as --amp of MMSegmentation's tools/train.py
            cfg.optim_wrapper.update(
                type="AmpOptimWrapper", loss_scale="dynamic", dtype=job["dtype"]
            )
        return cfg

    def build(self) -> None:
        from mmengine import DefaultScope
        from mmengine.model import revert_sync_batchnorm
        from mmengine.optim import build_optim_wrapper
        from mmseg.registry import MODELS

        cfg = self.config()
        torch.backends.cudnn.benchmark = cfg.env_cfg.cudnn_benchmark
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
            model.init_weights()
            self.model = revert_sync_batchnorm(model).to(self.job["device"])
            self.wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        self.optimizer = self.wrapper.optimizer
        samples = [self.sample() for _ in range(self.job["batch"])]
        images = [self.image() for _ in samples]
        self.batch = {"inputs": images, "data_samples": samples}

    def sample(self) -> Any:
        """A label map of patches, with some that are left out."""
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        size, classes = self.job["size"], self.model.decode_head.num_classes
        labels = torch.randint(0, classes, (8, 8), generator=self.random)
        labels[0, ::4] = 255
        labels = nn.functional.interpolate(labels[None, None].float(), (size, size))[0].long()
        sample = SegDataSample(metainfo={"img_shape": (size, size), "ori_shape": (size, size)})
        sample.gt_sem_seg = PixelData(data=labels)
        return sample

    def update(self) -> None:
        self.model.train_step(self.batch, self.wrapper)


class MaskRCNN(Training):
    """Detectron2's, with this project's trainer."""

    @staticmethod
    def prepare() -> None:
        """Import Detectron2."""
        import _detectron2

        _detectron2.prepare()
        import diffbackbone.detectron2.engine  # noqa: F401

    def config(self) -> Any:
        """The config, with what the case asks for."""
        import _detectron2

        job = self.job
        options = {
            "MODEL.DEVICE": job["device"],
            "MODEL.DIFFUSION.UNET": job["unet"],
            "MODEL.DIFFUSION.CHECKPOINT": job["checkpoint"] or "",
            "MODEL.DIFFUSION.FREEZE": job["mode"] == "frozen",
            "SOLVER.AMP.ENABLED": job["dtype"] != "float32",
        }
        if job["dtype"] != "float32":
            options["SOLVER.AMP.DTYPE"] = job["dtype"]
        if job["activation_checkpointing"] != "config":
            recompute = job["activation_checkpointing"] == "on"
            options["MODEL.DIFFUSION.ACTIVATION_CHECKPOINTING"] = recompute
        if width := job["head_channels"]:
            for key in ("FPN.OUT", "ROI_BOX_HEAD.CONV", "ROI_BOX_HEAD.FC", "ROI_MASK_HEAD.CONV"):
                options[f"MODEL.{key}_{'CHANNELS' if key == 'FPN.OUT' else 'DIM'}"] = width
        config = _common.find_config(job["config"], _detectron2.CONFIG_DIR, (".yaml",))
        return _detectron2.load_yaml(config, [str(x) for pair in options.items() for x in pair])

    def build(self) -> None:
        from diffbackbone.detectron2.engine import Trainer, make_step_trainer

        cfg = self.config()
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        self.model = Trainer.build_model(cfg)
        self.optimizer = Trainer.build_optimizer(cfg, self.model)
        classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        batch = [self.sample(classes) for _ in range(self.job["batch"])]
        amp = cfg.SOLVER.AMP
        self.model.train()
        self.trainer = make_step_trainer(
            self.model, itertools.repeat(batch), self.optimizer, amp.ENABLED, amp.DTYPE
        )

    def sample(self, classes: int) -> dict[str, Any]:
        """An image with objects: octagons of 1/16 to 3/4 of its side."""
        from detectron2.structures import Boxes, Instances, PolygonMasks

        size = self.job["size"]
        sides = size * 12 ** torch.rand(OBJECTS, 2, generator=self.random) / 16
        centers = sides / 2 + (size - sides) * torch.rand(OBJECTS, 2, generator=self.random)
        angles = torch.arange(8) * math.pi / 4
        unit = torch.stack([angles.cos(), angles.sin()], dim=1)
        polygons = centers[:, None] + sides[:, None] / 2 * unit
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.cat([centers - sides / 2, centers + sides / 2], dim=1))
        instances.gt_classes = torch.randint(0, classes, (OBJECTS,), generator=self.random)
        instances.gt_masks = PolygonMasks([[polygon.flatten().numpy()] for polygon in polygons])
        return {"image": self.image(), "height": size, "width": size, "instances": instances}

    def update(self) -> None:
        from detectron2.utils.events import EventStorage

        with EventStorage():
            self.trainer.run_step()


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer allocate what it keeps from step to step, the weights left as they are.

    It does so in its first step, when activations are no longer there: the first training step
    takes less memory than all others.
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


def count_attention(registry: dict[Any, Any]) -> None:
    """Let torch's counter see the attention kernels of CPUs too, which it has no formula for."""
    for suffix in ("", "_backward"):
        kernel = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}")
        known = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{suffix}")
        registry.setdefault(kernel, registry[known])


TRAININGS: dict[str, type[Training]] = {"upernet": UperNet, "mask_rcnn": MaskRCNN}


# --------------------------------------------------------------------------------------------------
# commands


class StepsWorker(Worker):
    """Answers commands; see the methods.

    Args:
        threads: Threads that torch may use; None leaves its choice.
    """

    def __init__(self, threads: int | None) -> None:
        super().__init__(threads, cudnn_benchmark=False)
        torch.backends.cudnn.allow_tf32 = True  # torch's default, which the frameworks leave
        self.training: Training | None = None

    def load(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Build the model; gives how many parameters there are, and how many are trained."""
        kind = TRAININGS[job["model"]]
        kind.prepare()
        self.begin(job["device"])
        self.training = kind(job)
        reset_peak(job["device"])
        parameters = list(self.training.model.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "activation_checkpointing": self.training.backbone.unet.activation_checkpointing,
        }

    def first(self) -> int:
        """Run the first step; gives its operations."""
        from diffbackbone.costs import counting_flops

        with counting_flops() as counter:
            counter.mod_tracker.__exit__(None, None, None)  # modules are not told apart
            count_attention(counter.flop_registry)
            self.training.stopwatch.time(self.training.update)
        reset_peak(self.training.job["device"])
        return counter.get_total_flops()

    def time(self, number: int) -> dict[str, Any]:
        """Run ``number`` steps; see :meth:`Stopwatch.time`."""
        training = self.training
        found: Sequence[dict[str, float]]
        found = [training.stopwatch.time(training.update) for _ in range(number)]
        return {what: sum(seconds[what] for seconds in found) / number for what in found[0]}

    def peak(self) -> dict[str, int]:
        """Most bytes that the timed steps took, weights and optimizer's state included."""
        device = self.training.job["device"]
        found = {"peak_bytes": peak_bytes(device) - self.baseline}
        if device != "cpu":
            found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        return found


if __name__ == "__main__":
    main(StepsWorker)
