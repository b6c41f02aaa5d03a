"""Training with MMEngine: runs that resume exactly, checkpoints that are complete.

MMEngine by itself resumes with other draws of augmentation and dropout, and removes old checkpoints
before it writes new ones.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_gather_object, broadcast_object_list, get_dist_info, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import DATASETS, HOOKS, LOOPS
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import Dataset

from diffbackbone.sources import first_line
from diffbackbone.utils import first_not_finite, lost_loss, seed_everything, write_text


@DATASETS.register_module()
class SeededDataset(Dataset):
    """A dataset whose random augmentation depends on the seed and the position in the run alone.

    Args:
        dataset: A dataset, or the config of one; its attributes are available here too.
    """

    def __init__(self, dataset: Dataset | Mapping[str, Any]) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("dataset"), name)  # None in a copy that is not filled yet

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        """Return the sample (seed, position, index), with the position's augmentation."""
        seed, position, index = key
        seed_everything(seed, position, 0)
        try:
            return self.dataset[index]
        except Exception as error:  # decoders and transforms fail in any way
            info = self.dataset.get_data_info(index)
            files = ", ".join(info[k] for k in ("img_path", "seg_map_path") if info.get(k))
            raise ValueError(
                f"training image {index} can't be read ({files}): {first_line(error)}"
            ) from error


@LOOPS.register_module()
class ResumableIterBasedTrainLoop(IterBasedTrainLoop):
    """MMEngine's loop by iterations, which goes on exactly where a checkpoint was written.

    Images, augmentation and the model's draws follow from the seed, the iteration and the process
    alone: a run that was stopped and resumed ends with the weights of one that was not. The sampler
    must be MMEngine's ``InfiniteSampler``.
    """

    def __init__(self, runner: Any, dataloader: Mapping[str, Any], **kwargs: Any) -> None:
        self._sampler_seed = dataloader["sampler"].get("seed")
        dataset = {"type": SeededDataset, "dataset": dataloader["dataset"]}
        super().__init__(runner, {**dataloader, "dataset": dataset}, **kwargs)
        self.dataloader_iterator = None  # MMEngine's starts at the first image
        sampler = self.dataloader.sampler
        if type(sampler) is not InfiniteSampler:
            raise ValueError(
                "ResumableIterBasedTrainLoop needs sampler=dict(type='InfiniteSampler'), got "
                f"{type(sampler).__name__}, which MMEngine's own IterBasedTrainLoop takes"
            )

    def run(self) -> torch.nn.Module:
        """Train from the last iteration that was done."""
        val_loop = self.runner.val_loop
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self._start_data()
        if 0 < self._iter == self._max_iters and val_loop is not None:
            val_loop.run()  # the run may have been stopped right before
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
            if val_loop is not None and due and self._iter >= self.val_begin:
                val_loop.run()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, data_batch: Any) -> None:
        """Run one iteration, seeded by its number."""
        seed_everything(self._seed, self._iter, 1, get_dist_info()[0])
        super().run_iter(data_batch)

    def _start_data(self) -> None:
        """Start the data at the next iteration, by the run's seed, also where it was resumed."""
        seeds = [self.runner.seed]
        broadcast_object_list(seeds)
        (self._seed,) = seeds
        rank, world = get_dist_info()
        sampler = self.dataloader.sampler
        sampler.seed = self._seed if self._sampler_seed is None else self._sampler_seed
        order = enumerate(InfiniteSampler(sampler.dataset, sampler.shuffle, sampler.seed))
        start = self._iter * self.dataloader.batch_sampler.batch_size
        sampler.indices = (
            (self._seed, local * world + rank, index)
            for local, index in itertools.islice(order, start, None)
        )
        self.dataloader_iterator = _InfiniteDataloaderIterator(self.dataloader)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """MMEngine's checkpoint hook, which removes old checkpoints only after writing the new one.

    The new checkpoint is written first, then the ``last_checkpoint`` file, and only then are old
    ones removed. Weights that are not finite are not written.
    """

    def before_train(self, runner: Any) -> None:
        """Reject intervals of iterations that fall between two steps of the optimizer."""
        super().before_train(runner)
        counts = getattr(runner.optim_wrapper, "_accumulative_counts", 1)
        given = {"interval": max(self.interval, 0), "save_begin": self.save_begin}
        if self.save_best and runner.val_loop is not None:  # the best one is written, too
            given["val_interval"] = runner.train_loop.val_interval
        for name, iterations in given.items():
            if iterations % counts and not self.by_epoch:
                raise ValueError(
                    f"{name}={iterations} is not a multiple of accumulative_counts={counts}: "
                    "checkpoints don't hold gradients between two steps of the optimizer"
                )

    def _path(self, step: int) -> str:
        return self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))

    def _remove(self, path: str) -> None:
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        # with FSDP each process sees its own shards; all must stop together
        found = all_gather_object(first_not_finite(runner.model.named_parameters()))
        if any(found):
            name = next(filter(None, found)).replace("_fsdp_wrapped_module.", "")
            raise FloatingPointError(
                lost_loss(f"after iteration {runner.iter + 1} the weights {name} are not finite")
            )
        kept = []
        if self.max_keep_ckpts > 0:
            kept = [*(other for other in self.keep_ckpt_ids if other != step), step]
            # with those removed below, so that a run killed before that removes them when resumed
            runner.message_hub.update_info("keep_ckpt_ids", kept)
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
            write_text(Path(runner.work_dir, "last_checkpoint"), self.last_ckpt)
        if self.max_keep_ckpts > 0:
            for outdated in kept[: -self.max_keep_ckpts]:
                self._remove(self._path(outdated))
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        backend, removals = self.file_backend, []
        self.file_backend = copy.copy(backend)  # records what to remove, after writing
        self.file_backend.remove = removals.append
        super()._save_best_checkpoint(runner, metrics)
        self.file_backend = backend
        several = getattr(self, "best_ckpt_path_dict", {})
        written = {getattr(self, "best_ckpt_path", None), *several.values()}
        for path in removals:
            if path not in written:  # a run resumed right there writes the same best again
                self._remove(path)
