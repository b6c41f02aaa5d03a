"""What every OpenMMLab code base shares: the backbone, its optimizer rules, input checks.

Everything is registered at MMEngine's root, so mmseg, mmdet and mmpretrain find it alike. Configs
import :mod:`diffbackbone.mmseg`, :mod:`diffbackbone.mmdet` or :mod:`diffbackbone.mmpretrain`, which
check the environment first.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Mapping
from reprlib import repr as shorten
from typing import Any

from diffbackbone import compat

compat.apply_mmengine_repairs()

from mmengine.hooks import Hook  # noqa: E402
from mmengine.logging import print_log  # noqa: E402
from mmengine.model import BaseModule, PretrainedInit  # noqa: E402
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper  # noqa: E402
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS  # noqa: E402
from torch import nn  # noqa: E402

from diffbackbone import openmmlab_engine, openmmlab_sharding  # noqa: E402, F401  register
from diffbackbone.backbone import RANDOM_WEIGHTS  # noqa: E402
from diffbackbone.backbone import DiffusionBackbone as _DiffusionBackbone  # noqa: E402
from diffbackbone.models.base import is_number  # noqa: E402
from diffbackbone.optim import layer_scales  # noqa: E402
from diffbackbone.utils import check_names  # noqa: E402


@MODELS.register_module()
class DiffusionBackbone(_DiffusionBackbone, BaseModule):
    """:class:`diffbackbone.DiffusionBackbone` for configs of the OpenMMLab code bases.

    Args:
        unet: A preset's name, or a dict of :class:`diffbackbone.UNetConfig` fields (``preset``
            names the one to start from).
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with guided-diffusion weights, a path
            or URL. They are loaded by ``init_weights()``, as everywhere in MMEngine; with
            ``freeze`` and without ``save_frozen`` already here, since checkpoints lack them.
        pretrained: The older way to write the same, which wins over ``init_cfg``: the
            checkpoint's path or URL. Unlike ``init_cfg``, mmseg's ``init_model`` and mmdet's
            ``init_detector`` don't remove it from the config.
        **kwargs: All other arguments of :class:`diffbackbone.DiffusionBackbone`.

    Raises:
        ValueError: See :class:`diffbackbone.DiffusionBackbone`.
    """

    def __init__(
        self,
        unet: str | Mapping[str, Any] = "gd256_uncond",
        init_cfg: dict | None = None,
        pretrained: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_names("DiffusionBackbone", kwargs, _ARGUMENTS)
        checkpoint = kwargs.pop("checkpoint", None)
        checkpoint = checkpoint if pretrained is None else pretrained
        _check_init(init_cfg, checkpoint)
        super().__init__(unet, **kwargs)
        if checkpoint is not None:
            init_cfg = {"type": "Pretrained", "checkpoint": checkpoint}
        self.init_cfg = copy.deepcopy(init_cfg)
        if self.frozen and not self.save_frozen:
            for cfg in self._split_init()[0]:
                self._load_initial(cfg["checkpoint"], cfg.get("prefix"))

    def _split_init(self) -> tuple[list[dict], list[dict]]:
        """The parts of ``init_cfg`` that load weights, and all others."""
        init_cfg = self.init_cfg or []
        cfgs = [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg)
        pretrained = [cfg for cfg in cfgs if cfg["type"] in ("Pretrained", PretrainedInit)]
        return pretrained, [cfg for cfg in cfgs if cfg not in pretrained]

    def _warn_random(self) -> None:
        """Nothing yet: weights come with ``init_weights()`` or with the whole model's."""

    def init_weights(self) -> None:
        """Initialise by ``init_cfg``; guided-diffusion weights come last, as in MMEngine.

        Raises:
            FileNotFoundError: No such checkpoint.
            CheckpointError: The checkpoint does not fit.
        """
        if self.is_init:
            return
        init_cfg = self.init_cfg
        pretrained, self.init_cfg = self._split_init()
        super().init_weights()
        self.init_cfg = init_cfg
        self.is_init = False  # not before the weights are there
        for cfg in pretrained:
            report = self.load(cfg["checkpoint"], cfg.get("prefix"))
            print_log(str(report), logger="current")
        self.is_init = True
        if not pretrained:
            print_log(RANDOM_WEIGHTS, logger="current", level=logging.WARNING)


_ARGUMENTS = (
    *(name for name in inspect.signature(_DiffusionBackbone.__init__).parameters if name != "self"),
    "init_cfg",
    "pretrained",
)


def _check_init(init_cfg: Any, checkpoint: Any) -> None:
    """Check what says where the weights come from.

    Raises:
        ValueError: It is of another type than MMEngine takes.
    """
    if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike)):
        raise ValueError(f"a checkpoint is a path or URL, got {shorten(checkpoint)}")
    cfgs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    for cfg in cfgs if init_cfg is not None else ():
        if not isinstance(cfg, Mapping) or "type" not in cfg:
            raise ValueError(
                "init_cfg must be dict(type='Pretrained', checkpoint=...), or a list of MMEngine's "
                f"initializers, got {shorten(cfg)}"
            )
        if cfg["type"] in ("Pretrained", PretrainedInit):
            check_names("init_cfg", cfg, ("type", "checkpoint", "prefix", "map_location"))
            if not isinstance(cfg.get("checkpoint"), (str, os.PathLike)):
                raise ValueError(
                    "init_cfg needs a checkpoint, a path or URL, got "
                    f"{shorten(cfg.get('checkpoint'))}"
                )


_FSDP_PART = "_fsdp_wrapped_module"
"""What FSDP puts into the names of modules."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DiffusionOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's ``paramwise_cfg``, with layer-wise learning-rate decay for the U-Net.

    On top of MMEngine's rules (``norm_decay_mult``, ``bias_decay_mult``, ``custom_keys``, ...)
    ``paramwise_cfg`` may hold

    * ``layer_decay_rate``: the learning rate of U-Net block b is multiplied by
      ``rate ** (last - b + 1)``, that of the time embedding by ``rate ** (last + 1)``, where
      ``last`` is the last tapped block; feedback layers, projections and heads keep the base rate.

    Frozen weights are not handed to the optimizer. Parameters of equal settings share one group,
    which keeps the optimizer's fused and foreach kernels fast. Under FSDP modules have the names
    that they have without it.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer and its wrapper.

        Raises:
            ValueError: The optimizer's ``lr`` is no number, or a rule can't be followed; see
                :meth:`add_params`.
        """
        if not is_number(self.base_lr):
            raise ValueError(f"optimizer.lr must be a number, got {shorten(self.base_lr)}")
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs) -> None:
        """Add the parameters of a module to the groups, by the rules of ``paramwise_cfg``.

        Raises:
            ValueError: ``layer_decay_rate`` is not in (0, 1], or no backbone is in the model; or
                ``flat_decay_mult`` is given under FSDP.
        """
        name = ".".join(part for part in prefix.split(".") if part != _FSDP_PART)
        super().add_params(params, module, prefix=name, **kwargs)
        if prefix:
            return
        if self.paramwise_cfg.get("flat_decay_mult") is not None and hasattr(module, _FSDP_PART):
            raise ValueError(
                "paramwise_cfg has flat_decay_mult, but FSDP's shards all have one dimension: take "
                "norm_decay_mult and bias_decay_mult"
            )
        rate = self.paramwise_cfg.get("layer_decay_rate", 1.0)
        scales = layer_scales(module, rate)
        groups: dict[tuple, dict] = {}
        for group in params:
            settings = {key: value for key, value in group.items() if key != "params"}
            (parameter,) = group["params"]
            if id(parameter) in scales:
                settings["lr"] = settings.get("lr", self.base_lr) * scales[id(parameter)]
            key = tuple(sorted(settings.items()))
            groups.setdefault(key, {"params": [], **settings})["params"].append(parameter)
        params[:] = groups.values()


IOU_METRICS = ("mIoU", "mDice", "mFscore")
"""What mmseg's ``IoUMetric`` can count."""


@HOOKS.register_module()
class CheckInputsHook(Hook):
    """Stop with a clear error on data that can't be trained on, before any work is lost.

    * A dataset without images stops the run before the first iteration.
    * A label that the head has no class for stops it with the image's path.
    * A metric that mmseg's ``IoUMetric`` doesn't have stops it before the first iteration, and an
      evaluation before the first image.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner) -> None:
        """Check that there are images to train and to validate on, the metrics, and the padding.

        Raises:
            ValueError: A dataset is empty, there is no such metric, or label maps are padded with
                a label that the heads have no class for.
        """
        self._check_metrics(runner.val_loop)
        model = getattr(runner.model, "module", runner.model)
        classes, ignored = _labels(model)
        pad = getattr(getattr(model, "data_preprocessor", None), "seg_pad_val", None)
        if classes is not None and pad is not None and not (0 <= pad < classes or ignored == {pad}):
            raise ValueError(
                f"data_preprocessor.seg_pad_val is {pad}, which pads label maps: it must be "
                f"the label that all heads and losses ignore, got ignore_index {_listed(ignored)}"
            )
        loops = {"train": runner.train_loop, "val": runner.val_loop}
        for name, loop in loops.items():
            dataset = getattr(getattr(loop, "dataloader", None), "dataset", None)
            if dataset is not None and len(dataset) == 0:
                raise ValueError(
                    f"the {name} dataset is empty: no image with a label map in "
                    f"{getattr(dataset, 'data_prefix', None) or getattr(dataset, 'data_root', '?')}"
                )

    def before_test(self, runner) -> None:
        """Check the metrics.

        Raises:
            ValueError: There is no such metric.
        """
        self._check_metrics(runner.test_loop)

    @staticmethod
    def _check_metrics(loop: Any) -> None:
        for metric in getattr(getattr(loop, "evaluator", None), "metrics", ()):
            if any(kind.__name__ == "IoUMetric" for kind in type(metric).__mro__):
                given = [metric.metrics] if isinstance(metric.metrics, str) else metric.metrics
                check_names("iou_metrics", given, IOU_METRICS)

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Check the labels of a batch.

        Raises:
            ValueError: A label is out of range.
        """
        classes, ignored = _labels(getattr(runner.model, "module", runner.model))
        if classes is None:
            return
        for sample in (data_batch or {}).get("data_samples") or []:
            labels = getattr(getattr(sample, "gt_sem_seg", None), "data", None)
            if labels is None:
                continue
            wrong = (labels < 0) | (labels >= classes)
            if len(ignored) == 1:
                wrong &= labels != next(iter(ignored))
            if wrong.any():
                raise ValueError(
                    f"label {int(labels[wrong].max())} in "
                    f"{getattr(sample, 'seg_map_path', 'a label map')}: the head has {classes} "
                    f"classes, so labels must be 0 to {classes - 1}, or the one that all heads and "
                    f"losses ignore (ignore_index {_listed(ignored)}), after reduce_zero_label, "
                    "which takes 1 off ADE20K's labels"
                )


def _labels(model: nn.Module) -> tuple[int | None, set[int]]:
    """The number of classes of a segmentor, and the other labels that its heads and losses ignore.

    Labels other than classes can be trained with only where all ignore the same one.
    """
    heads = [getattr(model, name, None) for name in ("decode_head", "auxiliary_head")]
    classes = getattr(model, "num_classes", None)
    if heads[0] is None or classes is None:
        return None, set()
    given = (
        getattr(module, name, None)
        for head in heads
        for module in (head.modules() if isinstance(head, nn.Module) else ())
        for name in ("ignore_index", "ignore_label")  # mmseg's OhemCrossEntropy has the latter
    )
    # a class that a loss leaves out by its own ignore_index is no label of the kind
    return classes, {x for x in given if isinstance(x, int) and not 0 <= x < classes}


def _listed(labels: set[int]) -> str:
    return ", ".join(map(str, sorted(labels))) or "None"
