"""Stop runs early with a clear error: labels without a class, lost losses."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from diffbackbone.utils import lost_loss


@HOOKS.register_module()
class CheckInputsHook(Hook):
    """Stop a segmentor's training on labels that are neither classes nor ignored."""

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch, and the one that pads label maps."""
        model = getattr(runner.model, "module", runner.model)
        classes, ignored = model.num_classes, ignored_label(model)
        found = {"data_preprocessor.seg_pad_val": torch.tensor(model.data_preprocessor.seg_pad_val)}
        for sample in data_batch["data_samples"]:
            found[sample.get("seg_map_path")] = sample.gt_sem_seg.data
        for where, labels in found.items():
            wrong = (labels < 0) | (labels >= classes)
            if ignored is not None:
                wrong &= labels != ignored
            if wrong.any():
                raise ValueError(
                    f"label {int(labels[wrong].max())} in {where}: allowed are 0 to {classes - 1} "
                    f"and the ignore_index of all heads and losses ({ignored}), after "
                    "reduce_zero_label subtracts 1"
                )


def ignored_label(model: nn.Module) -> int | None:
    """Return the label beside a segmentor's classes that all heads and losses ignore, if any."""
    heads = [model.decode_head, getattr(model, "auxiliary_head", None)]
    modules = [module for head in heads if head for module in head.modules()]
    names = ("ignore_index", "ignore_label")  # mmseg's OhemCrossEntropy has the latter
    given = {getattr(module, name, None) for module in modules for name in names}
    # a loss may leave out a class by its own ignore_index
    others = {x for x in given if isinstance(x, int) and not 0 <= x < model.num_classes}
    return others.pop() if len(others) == 1 else None


@HOOKS.register_module()
class CheckLossHook(Hook):
    """Stop a run whose loss is NaN or infinite, before anything is written.

    On a GPU the loss stays there, and is checked every ``interval`` iterations. Where a loss scaler
    skips steps, as in float16, single non-finite losses are tolerated.

    Args:
        interval: Iterations between two checks of a GPU's losses, at least 1.
        patience: Non-finite losses in a row that are tolerated where steps are skipped.
    """

    priority = "NORMAL"  # checkpoints are VERY_LOW, hence later

    def __init__(self, interval: int = 10, patience: int = 20) -> None:
        self.interval, self.patience = interval, patience
        self._streak = torch.tensor(0)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Check the loss of an iteration."""
        lost = ~torch.isfinite(outputs["loss"].detach())  # the sum of all losses
        self._streak = (self._streak.to(lost.device) + 1) * lost
        if lost.is_cuda and not self.every_n_train_iters(runner, self.interval):
            return
        longest = self._streak.clone()
        all_reduce(longest, "max")  # all processes stop, or none
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        skips = scaler is not None and scaler.is_enabled()
        if longest > (self.patience if skips else 0):
            values = {name: float(x) for name, x in outputs.items() if "loss" in name}
            raise FloatingPointError(
                lost_loss(
                    f"since iteration {runner.iter + 2 - int(longest)} the loss of a process is "
                    f"NaN or infinite (losses of this one: {values})"
                )
            )
