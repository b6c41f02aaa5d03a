"""Train and evaluate with Detectron2's Python configs, as its own lazyconfig_train_net.py does.

For instance: python tools/lazyconfig_train_net.py --config mask_rcnn_gd_t75_b24.py train.max_iter=9

Python configs are programs: don't run one from a source that you don't trust.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import OmegaConf
from torch import nn

from diffbackbone.detectron2.checkpoint import Checkpointer, CheckpointHook
from diffbackbone.detectron2.datasets import (
    build_train_loader,
    check_classes,
    load_dicts,
    naming_datasets,
)
from diffbackbone.detectron2.engine import SeedIterations, make_step_trainer, wrap_distributed
from diffbackbone.detectron2.launch import run_training
from diffbackbone.utils import UserError, seed_everything


def load_lazy(config_file: str, options: Sequence[str] = ()) -> Any:
    """Load a Python config, which runs it, and apply overrides ``key=value``.

    Raises:
        UserError: An override's key doesn't exist; LazyConfig would add it.
    """
    cfg = LazyConfig.load(config_file)
    for option in options:
        key = option.partition("=")[0]
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        names = list(node) if OmegaConf.is_dict(node) else []
        if OmegaConf.is_list(node):
            names = list(map(str, range(len(node))))
        if name not in names and "_target_" not in names:  # else an argument of the class
            raise UserError(f"config key {key!r} does not exist; {parent!r} has {names}")
    return LazyConfig.apply_overrides(cfg, list(options))


def evaluate(cfg: Any, model: nn.Module) -> Any:
    """Evaluate, if the config has an evaluator."""
    if "evaluator" not in cfg.dataloader:
        return None
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def train(cfg: Any, resume: bool = False) -> None:
    """Train, with ``resume`` from the last checkpoint in the output folder."""
    for name in dataset_names(cfg, "test"):
        load_dicts(name)
    seeding = SeedIterations(cfg.dataloader.train.get("seed", 0))
    seed_everything(seeding.seed)
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = wrap_distributed(model, **cfg.train.ddp)
    amp = cfg.train.amp
    trainer = make_step_trainer(model, None, optimizer, amp.enabled, amp.get("dtype", "auto"))
    checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=trainer)
    main = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks(
        [
            seeding,
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            CheckpointHook(checkpointer, **cfg.train.checkpointer) if main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    loader = cfg.dataloader.train
    target = loader._target_  # a name if the config was saved and loaded again
    if (locate(target) if isinstance(target, str) else target) is build_train_loader:
        loader.seed, loader.start_iter = seeding.seed, start
    with naming_datasets(dataset_names(cfg, "train")):
        trainer.reset_data_loader(lambda: instantiate(loader))
    check_classes(checkpointer.model, dataset_names(cfg, "train") + dataset_names(cfg, "test"))
    trainer.train(start, cfg.train.max_iter)


def run(args: argparse.Namespace) -> Any:
    """Run one process; with ``--eval-only``, return the results."""
    cfg = load_lazy(args.config_file, args.opts)
    default_setup(cfg, args)
    if not args.eval_only:
        return train(cfg, args.resume)
    model = instantiate(cfg.model).to(cfg.train.device)
    checkpointer = Checkpointer(model, cfg.train.output_dir, strict=True)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    return evaluate(cfg, model)


def dataset_names(cfg: Any, part: str) -> list[str]:
    """Return the names of the datasets of ``"train"`` or ``"test"``."""
    names = OmegaConf.select(cfg, f"dataloader.{part}.dataset.names") or []
    return [names] if isinstance(names, str) else list(names)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_training(argv, (".py",), __doc__, run)
