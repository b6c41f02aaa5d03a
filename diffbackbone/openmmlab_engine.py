"""Training with MMEngine: runs that resume exactly, checkpoints that are whole.

MMEngine by itself resumes by loading all images that were trained on before, with another shuffle
where no seed was set and with other draws of augmentation and dropout; it writes checkpoints in
place, after it has removed old ones. :class:`ResumableIterBasedTrainLoop` and
:class:`WholeCheckpointHook` take their parts, in configs by name; :class:`CheckLossHook` stops a
run whose loss has no value any more.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffbackbone import compat

compat.apply_mmengine_repairs()

import torch  # noqa: E402
from mmengine.dataset import InfiniteSampler  # noqa: E402
from mmengine.dist import (  # noqa: E402
    all_gather_object,
    all_reduce,
    broadcast_object_list,
    get_dist_info,
    is_main_process,
)
from mmengine.hooks import CheckpointHook, Hook  # noqa: E402
from mmengine.logging import print_log  # noqa: E402
from mmengine.registry import DATASETS, HOOKS, LOOPS  # noqa: E402
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop  # noqa: E402
from mmengine.runner.loops import _InfiniteDataloaderIterator  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from diffbackbone.checkpoint import first_line  # noqa: E402
from diffbackbone.runs import (  # noqa: E402
    first_not_finite,
    lost_loss,
    seed_everything,
    write_whole,
)

# --------------------------------------------------------------------------------------------------
# data


@DATASETS.register_module()
class SeededDataset(Dataset):
    """A dataset whose random augmentation depends on the seed and the position in the run alone.

    Args:
        dataset: A dataset, or the config of one. Its attributes are this one's.
    """

    def __init__(self, dataset: Dataset | Mapping[str, Any]) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # a copy on its way to a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, key: int | tuple[int, int, int]) -> Any:
        """Sample ``index``; as (seed, position, index), that which the position draws of it.

        Raises:
            ValueError: It could not be read; the message names its files.
        """
        index = key
        if isinstance(key, tuple):
            seed, position, index = key
            seed_everything(seed, position, 0)
        try:
            return self.dataset[index]
        except Exception as error:  # decoders and transforms fail in any way
            raise ValueError(f"{self._describe(index)}: {first_line(error)}") from error

    def _describe(self, index: int) -> str:
        try:
            info = self.dataset.get_data_info(index)
            files = [info[key] for key in ("img_path", "seg_map_path") if info.get(key)]
        except Exception:  # a dataset without such records
            files = []
        return f"training image {index} can't be read ({', '.join(files) or 'files unknown'})"


def _positions(sampler: InfiniteSampler, seed: int, start: int) -> Iterator[tuple[int, int, int]]:
    """What :class:`SeededDataset` takes, from this process's sample number ``start`` on."""
    rank, world = get_dist_info()
    order = InfiniteSampler(sampler.dataset, sampler.shuffle, sampler.seed)
    for local, index in enumerate(order):
        if local >= start:
            yield seed, local * world + rank, index


# --------------------------------------------------------------------------------------------------
# the loop


def accumulated(runner: Any) -> int:
    """How many iterations the optimizer makes one step of."""
    return getattr(runner.optim_wrapper, "_accumulative_counts", 1)


@LOOPS.register_module()
class ResumableIterBasedTrainLoop(IterBasedTrainLoop):
    """MMEngine's loop by iterations, which goes on exactly where a checkpoint was written.

    Images, augmentation and the model's draws follow from the seed, the iteration and the process
    alone: a run that was stopped and resumed ends with the weights of one that was not. Nothing is
    loaded twice for it. The sampler must be MMEngine's ``InfiniteSampler``.

    Args:
        runner: The runner.
        dataloader: Config of the training data.
        **kwargs: See MMEngine's ``IterBasedTrainLoop``.

    Raises:
        ValueError: The data come in an order that can't be found again.
    """

    def __init__(self, runner: Any, dataloader: Any, **kwargs: Any) -> None:
        if not isinstance(dataloader, Mapping):
            raise ValueError(
                "ResumableIterBasedTrainLoop needs the config of a dataloader, got "
                f"{type(dataloader).__name__}; train_cfg=dict(type='IterBasedTrainLoop', ...) takes"
                " a built one"
            )
        sampler = dataloader.get("sampler")
        self._own_seed = isinstance(sampler, Mapping) and sampler.get("seed") is not None
        dataset = {"type": SeededDataset, "dataset": dataloader["dataset"]}
        super().__init__(runner, {**dataloader, "dataset": dataset}, **kwargs)
        sampler = self.dataloader.sampler
        if type(sampler) is not InfiniteSampler:
            raise ValueError(
                "ResumableIterBasedTrainLoop needs sampler=dict(type='InfiniteSampler'), got "
                f"{type(sampler).__name__}; with other samplers take "
                "train_cfg=dict(type='IterBasedTrainLoop', ...), which does not resume exactly"
            )
        # MMEngine's counter would start at the first image, before a checkpoint is read
        self.dataloader_iterator = None

    def run(self) -> torch.nn.Module:
        """Train from the last iteration that was done.

        Returns:
            The model.

        Raises:
            ValueError: The checkpoint was written between two steps of the optimizer.
        """
        counts = accumulated(self.runner)
        if self._iter % counts and self._iter < self._max_iters:
            raise ValueError(
                f"the checkpoint of iteration {self._iter} can't be resumed with "
                f"accumulative_counts={counts}: the gradients since the last step are not in it; "
                f"take one of an iteration that is a multiple of {counts}"
            )
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self._seed = self._start_data()
        validate = self.runner.val_loop is not None
        if 0 < self._iter == self._max_iters and validate:
            self.runner.val_loop.run()  # the run may have been stopped right before
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
            if validate and due and self._iter >= self.val_begin:
                self.runner.val_loop.run()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, data_batch: Any) -> None:
        """One iteration, with draws that it alone determines."""
        seed_everything(self._seed, self._iter, 1, get_dist_info()[0])
        super().run_iter(data_batch)

    def _start_data(self) -> int:
        """Have the data begin with those of the next iteration.

        Returns:
            The seed of the run, which a resumed one has from its checkpoint.
        """
        seeds = [self.runner.seed]
        broadcast_object_list(seeds)
        sampler, loader = self.dataloader.sampler, self.dataloader
        if not self._own_seed:
            sampler.seed = seeds[0]
        start = self._iter * loader.batch_sampler.batch_size
        if start:
            print_log(f"the data go on after iteration {self._iter}", logger="current")
        sampler.indices = _positions(sampler, seeds[0], start)
        self.dataloader_iterator = _InfiniteDataloaderIterator(loader)
        return seeds[0]


# --------------------------------------------------------------------------------------------------
# checkpoints


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """MMEngine's checkpoint hook, in an order in which nothing can be lost.

    The new checkpoint is written whole first, then the note that it is the last, and only then are
    old ones removed. Weights that are not finite are not written. With ``max_keep_ckpts``, a
    resumed run also counts what an interrupted one had left. Where gradients are accumulated,
    checkpoints must fall on the optimizer's steps, as gradients are not in them.
    """

    def before_train(self, runner: Any) -> None:
        """Find the checkpoints of the run that is resumed.

        Raises:
            ValueError: Checkpoints would be written between two steps of the optimizer.
        """
        self._check_accumulation(runner)
        super().before_train(runner)
        if self.max_keep_ckpts < 1 or runner.iter == 0 or not os.path.isdir(str(self.out_dir)):
            return
        pattern = re.escape(self.filename_tmpl).replace(re.escape("{}"), r"(\d+)")
        found = (re.fullmatch(pattern, name) for name in os.listdir(self.out_dir))
        now = runner.epoch if self.by_epoch else runner.iter
        steps = sorted(int(match[1]) for match in found if match and int(match[1]) <= now)
        for step in steps[: -self.max_keep_ckpts]:
            self._remove(self.file_backend, self._path(step))
        self.keep_ckpt_ids = deque(steps[-self.max_keep_ckpts :], self.max_keep_ckpts)

    def _check_accumulation(self, runner: Any) -> None:
        counts, loop = accumulated(runner), runner.train_loop
        epochs = isinstance(loop, EpochBasedTrainLoop)
        length = len(loop.dataloader) if epochs else 1
        given = []  # key, value, iterations in its unit
        if self.interval > 0 and (epochs or not self.by_epoch):  # else only at the end
            unit = length if self.by_epoch else 1
            given += [("interval", self.interval, unit), ("save_begin", self.save_begin, unit)]
        if self.save_best and runner.val_loop is not None:
            given += [("val_interval", value, length) for value in loop.dynamic_intervals]
        for key, value, unit in given:
            if value * unit % counts:
                allowed = f"a multiple of {counts // math.gcd(counts, unit)}"
                raise ValueError(
                    f"with accumulative_counts={counts}, the {key} of checkpoints must be {allowed}"
                    f"{f' epochs, each of {unit} iterations' if unit > 1 else ''}; got {value}. "
                    "Gradients between two steps of the optimizer are not saved"
                )

    def _path(self, step: int) -> str:
        return self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))

    @staticmethod
    def _remove(backend: Any, path: str) -> None:
        if not is_main_process():
            return
        if backend.isfile(path):
            backend.remove(path)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        # of shards, one process sees what others don't, and would leave them waiting for it
        found = all_gather_object(first_not_finite(runner.model.named_parameters()))
        name = next((name for name in found if name is not None), None)
        if name is not None:
            name = name.replace("_fsdp_wrapped_module.", "")
            raise FloatingPointError(
                lost_loss(f"after iteration {runner.iter + 1} the weights {name} are not finite")
            )
        outdated = None
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        self.last_ckpt = self._path(step)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            self.filename_tmpl.format(step),
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            note = Path(runner.work_dir, "last_checkpoint")
            write_whole(note, lambda partial: partial.write_text(self.last_ckpt))
        if outdated is not None:
            self._remove(self.file_backend, self._path(outdated))

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        backend = self.file_backend
        self.file_backend = later = _RemovesLater(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        several = getattr(self, "best_ckpt_path_dict", None) or {}
        written = {getattr(self, "best_ckpt_path", None), *several.values(), self.last_ckpt}
        for path in later.removals:
            if path not in written:  # a run resumed right there writes the same best again
                self._remove(backend, path)


class _RemovesLater:
    """A storage backend that notes what to remove in place of removing it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.removals: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.removals.append(path)

    rmtree = remove


# --------------------------------------------------------------------------------------------------
# losses


@HOOKS.register_module()
class CheckLossHook(Hook):
    """Stop a run whose loss is NaN or infinite, before anything is written.

    On a GPU the losses stay there, and are looked at every ``interval`` iterations. Where a loss
    scaler skips steps, as in float16, single ones are forgiven.

    Args:
        interval: Iterations between two looks at a GPU's losses, from 1.
        patience: How many iterations in a row may have no loss where steps are skipped, from 0.

    Raises:
        ValueError: A number is out of range.
    """

    priority = "NORMAL"  # checkpoints are VERY_LOW, hence later

    def __init__(self, interval: int = 10, patience: int = 20) -> None:
        if interval < 1 or patience < 0:
            raise ValueError(
                "CheckLossHook needs an interval from 1 and a patience from 0, got "
                f"{interval} and {patience}"
            )
        self.interval, self.patience = interval, patience
        self._streak: torch.Tensor | None = None

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Look at the losses of an iteration.

        Raises:
            FloatingPointError: They have no value; says since when, and what to try.
        """
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
        streak = int(longest)
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        skips = scaler is not None and scaler.is_enabled()
        if streak > (self.patience if skips else 0):
            values = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
            if not int(self._streak):
                values = "in another process"
            raise FloatingPointError(
                lost_loss(
                    f"since iteration {runner.iter + 2 - streak} the loss is NaN or infinite "
                    f"({values})"
                )
            )
