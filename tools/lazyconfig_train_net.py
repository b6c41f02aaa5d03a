"""Train and evaluate with Detectron2's Python configs, as its own lazyconfig_train_net.py does.

For instance::

    python tools/lazyconfig_train_net.py --config mask_rcnn_gd_t75_b24.py --num-gpus 4
    python tools/lazyconfig_train_net.py --config mask_rcnn_gd_t75_b24.py train.max_iter=1000

Python configs are programs: run none from a source that you don't trust.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import _common
import _detectron2


def load(args: argparse.Namespace) -> Any:
    """The config, with what the command line changes in it.

    Raises:
        ValueError: An option names a key that doesn't exist.
    """
    from detectron2.config import LazyConfig

    cfg = LazyConfig.load(args.config_file)
    options = [option for option in args.opts if option != "--"]
    for option in options:
        key = option.partition("=")[0].lstrip("~+")
        if "=" not in option and not option.startswith("~"):
            raise ValueError(f"options of Python configs are written key=value, got {option!r}")
        _check_key(cfg, key)
    return LazyConfig.apply_overrides(cfg, options)


def _check_key(cfg: Any, key: str) -> None:
    node = cfg
    for name in key.split("."):
        if not hasattr(node, "keys") or (name not in node and "_target_" not in node):
            allowed = ", ".join(map(str, node.keys())) if hasattr(node, "keys") else "no keys"
            raise ValueError(f"there is no config key {key!r}: {name!r} is none of {allowed}")
        if name not in node:
            return  # an argument that the class has a default for
        node = node[name]


def test(cfg: Any, model: Any) -> Any:
    """Evaluate."""
    from detectron2.config import instantiate
    from detectron2.evaluation import inference_on_dataset, print_csv_format

    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def train(args: argparse.Namespace, cfg: Any) -> None:
    """Train."""
    from detectron2.config import instantiate
    from detectron2.engine import default_writers, hooks
    from detectron2.utils import comm

    from diffbackbone import detectron2_engine as engine

    seeding = engine.SeedIterations(cfg.dataloader.train.get("seed", 0))
    engine.seed_everything(seeding.seed)
    model = instantiate(cfg.model).to(cfg.train.device)
    engine.log_size(model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = engine.wrap_distributed(model, **cfg.train.ddp)
    amp = cfg.train.amp
    trainer = engine.make_step_trainer(
        model, None, optimizer, amp.enabled, amp.get("dtype", "auto")
    )
    checkpointer = engine.Checkpointer(model, cfg.train.output_dir, trainer=trainer)
    main = comm.is_main_process()
    trainer.register_hooks(
        [
            seeding,
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: test(cfg, model)),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter),
                period=cfg.train.log_period,
            )
            if main
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    start = trainer.iter + 1 if args.resume and checkpointer.has_checkpoint() else 0
    loader = cfg.dataloader.train
    if str(loader._target_).endswith("build_train_loader"):
        loader.seed, loader.start_iter = seeding.seed, start
    trainer.reset_data_loader(lambda: instantiate(loader))
    trainer.train(start, cfg.train.max_iter)


def main(args: argparse.Namespace) -> Any:
    """One process of a run; see :func:`train_net.main`."""
    _detectron2.prepare()
    from detectron2.config import instantiate
    from detectron2.engine import default_setup

    from diffbackbone.detectron2_engine import Checkpointer

    cfg = load(args)
    default_setup(cfg, args)
    if not args.eval_only:
        return train(args, cfg)
    model = instantiate(cfg.model).to(cfg.train.device)
    checkpointer = Checkpointer(model, cfg.train.output_dir, strict=True)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    return test(cfg, model)


def check(args: argparse.Namespace) -> None:
    """Look at everything that a run will need, before it starts.

    Raises:
        ValueError: A key, a value or a dataset's name is wrong.
        FileNotFoundError: Data are missing.
        SystemExit: A checkpoint is missing.
    """
    from diffbackbone.detectron2_engine import check_datasets

    cfg = load(args)
    names: list[str] = []
    for part in ("train", "test"):
        dataset = cfg.dataloader[part].get("dataset")
        found = dataset.get("names", ()) if hasattr(dataset, "get") else ()
        if part == "test" or not args.eval_only:
            names += [found] if isinstance(found, str) else list(found)
    check_datasets(names)
    if cfg.train.init_checkpoint:
        _common.check_checkpoint(cfg.train.init_checkpoint.partition("?")[0])
    elif args.eval_only and not args.resume:
        raise ValueError("--eval-only needs train.init_checkpoint=CHECKPOINT, or --resume")


def entry(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    _detectron2.prepare()
    args = _detectron2.parse_args(argv, ".py", __doc__)
    with _detectron2.clear_errors():
        check(args)
        _detectron2.run(main, args)


if __name__ == "__main__":
    entry()
