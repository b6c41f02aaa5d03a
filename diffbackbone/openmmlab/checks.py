"""Stop runs early with a clear error: missing data, wrong labels, lost losses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from diffbackbone.utils import UserError, check_names, lost_loss


def check_folders(cfg: Config, dataloaders: Sequence[str]) -> None:
    """Check that the folders that mmseg's datasets read from exist and hold files.

    Args:
        cfg: The config.
        dataloaders: Keys of the dataloaders to check.

    Raises:
        UserError: Names each folder that is missing or empty, and how to read from elsewhere.
    """
    problems, options = [], []
    for name in dataloaders:
        for key, dataset in _leaf_datasets(name, cfg.get(name)):
            for folder in _folders(dataset):
                if not any(files for _, _, files in os.walk(folder, followlinks=True)):
                    state = "no files in" if os.path.isdir(folder) else "no folder"
                    problems.append(f"\n  {key}: {state} {folder}")
                    options.append(f"{key}.data_root=DIR")
    if problems:
        raise UserError(
            f"there are no data to read:{''.join(problems)}\n"
            f"Relative paths start at {os.getcwd()}. To read from elsewhere, add\n"
            f"  --cfg-options {' '.join(dict.fromkeys(options))}\n"
            "Sample data in ADE20K's layout, with DIR data/sample/ADEChallengeData2016, come from\n"
            "  python tools/make_sample_data.py"
        )


def _leaf_datasets(key: str, dataset: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Descend through wrappers (``dataset`` and ``datasets``) to the datasets with folders."""
    if not isinstance(dataset, Mapping):
        return
    if "dataset" in dataset:
        yield from _leaf_datasets(f"{key}.dataset", dataset["dataset"])
    elif "datasets" in dataset:
        for index, part in enumerate(dataset["datasets"]):
            yield from _leaf_datasets(f"{key}.datasets.{index}", part)
    else:
        yield key, dataset


def _folders(dataset: Mapping[str, Any]) -> Iterator[str]:
    """Yield the local folders of images and label maps; some test sets have no label maps."""
    prefixes = dataset.get("data_prefix") or {}
    for key in ("img_path", "seg_map_path"):
        folder = os.path.join(dataset.get("data_root") or "", prefixes.get(key) or "")
        if prefixes.get(key) and not dataset.get("backend_args") and "://" not in folder:
            yield folder


@HOOKS.register_module()
class CheckInputsHook(Hook):
    """Stop with a clear error on data that can't be trained on, before any work is lost.

    Before the first iteration: datasets without images, label padding that the heads don't ignore,
    and metrics that mmseg's ``IoUMetric`` doesn't have. In training: labels that the head has no
    class for.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Any) -> None:
        """Check that there are images to train and to validate on, the metrics, and the padding."""
        _check_metrics(runner.val_loop)
        model = getattr(runner.model, "module", runner.model)
        classes, ignored = _labels(model)
        pad = getattr(getattr(model, "data_preprocessor", None), "seg_pad_val", None)
        if classes is not None and pad is not None and not (0 <= pad < classes or ignored == {pad}):
            raise ValueError(
                f"data_preprocessor.seg_pad_val is {pad}, which pads label maps: it must be the "
                f"label that all heads and losses ignore, got ignore_index {sorted(ignored)}"
            )
        for name, loop in (("train", runner.train_loop), ("val", runner.val_loop)):
            dataset = getattr(getattr(loop, "dataloader", None), "dataset", None)
            if dataset is not None and len(dataset) == 0:
                raise ValueError(
                    f"the {name} dataset is empty: no image with a label map in "
                    f"{getattr(dataset, 'data_prefix', None) or getattr(dataset, 'data_root', '?')}"
                )

    def before_test(self, runner: Any) -> None:
        """Check the metrics."""
        _check_metrics(runner.test_loop)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch."""
        classes, ignored = _labels(getattr(runner.model, "module", runner.model))
        if classes is None:
            return
        for sample in (data_batch or {}).get("data_samples") or []:
            if "gt_sem_seg" not in sample:
                continue
            labels = sample.gt_sem_seg.data
            wrong = (labels < 0) | (labels >= classes)
            if len(ignored) == 1:
                wrong &= labels != next(iter(ignored))
            if wrong.any():
                raise ValueError(
                    f"label {int(labels[wrong].max())} in {sample.get('seg_map_path')}: allowed "
                    f"are 0 to {classes - 1} and the label that all heads and losses ignore "
                    f"(ignore_index {sorted(ignored)}), after reduce_zero_label subtracts 1"
                )


def _check_metrics(loop: Any) -> None:
    for metric in getattr(getattr(loop, "evaluator", None), "metrics", ()):
        if any(kind.__name__ == "IoUMetric" for kind in type(metric).__mro__):
            given = [metric.metrics] if isinstance(metric.metrics, str) else metric.metrics
            check_names("iou_metrics", given, ("mIoU", "mDice", "mFscore"))


def _labels(model: nn.Module) -> tuple[int | None, set[int]]:
    """Return a segmentor's number of classes, and the other labels that heads and losses ignore.

    Labels other than classes can be trained with only where all ignore the same one.
    """
    heads = [getattr(model, name, None) for name in ("decode_head", "auxiliary_head")]
    classes = getattr(model, "num_classes", None)
    if heads[0] is None or classes is None:
        return None, set()
    modules = [m for head in heads if isinstance(head, nn.Module) for m in head.modules()]
    names = ("ignore_index", "ignore_label")  # mmseg's OhemCrossEntropy has the latter
    given = {getattr(module, name, None) for module in modules for name in names}
    # a loss may leave out a class by its own ignore_index
    return classes, {x for x in given if isinstance(x, int) and not 0 <= x < classes}


@HOOKS.register_module()
class CheckLossHook(Hook):
    """Stop a run whose loss is NaN or infinite, before anything is written.

    On a GPU the losses stay there, and are checked every ``interval`` iterations. Where a loss
    scaler skips steps, as in float16, single non-finite losses are tolerated.

    Args:
        interval: Iterations between two checks of a GPU's losses, at least 1.
        patience: Non-finite losses in a row that are tolerated where steps are skipped.
    """

    priority = "NORMAL"  # checkpoints are VERY_LOW, hence later

    def __init__(self, interval: int = 10, patience: int = 20) -> None:
        self.interval, self.patience = interval, patience
        self._streak: torch.Tensor | None = None

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Check the losses of an iteration."""
        losses = {
            name: torch.as_tensor(value).detach()
            for name, value in (outputs or {}).items()
            if "loss" in name
        }
        if not losses:
            return
        finite = torch.stack([value.float().isfinite().all() for value in losses.values()]).all()
        if self._streak is None:
            self._streak = torch.zeros((), dtype=torch.long, device=finite.device)
        self._streak = torch.where(finite, 0, self._streak + 1)
        if finite.is_cuda and not self.every_n_train_iters(runner, self.interval):
            return
        longest = self._streak.clone()
        all_reduce(longest, "max")  # all processes stop, or none
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        skips = scaler is not None and scaler.is_enabled()
        if longest > (self.patience if skips else 0):
            values = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
            raise FloatingPointError(
                lost_loss(
                    f"since iteration {runner.iter + 2 - int(longest)} the loss is NaN or infinite "
                    f"({values if self._streak else 'in another process'})"
                )
            )
