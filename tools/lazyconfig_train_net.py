"""Train and evaluate with Detectron2's Python configs, as its own lazyconfig_train_net.py does.

For instance::

    python tools/lazyconfig_train_net.py --config mask_rcnn_gd_t75_b24.py --num-gpus 4
    python tools/lazyconfig_train_net.py --config mask_rcnn_gd_t75_b24.py train.max_iter=1000

Python configs are programs: run none from a source that you don't trust.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

import _detectron2

EVALUATED = ("model", "dataloader", "train")
"""What a Python config consists of."""
TRAINED = (*EVALUATED, "optimizer", "lr_multiplier")
"""What a Python config to train by consists of."""


def load(args: argparse.Namespace) -> Any:
    """The config, with what the command line changes in it.

    Raises:
        ValueError: The file is no config, or an option can't be applied.
    """
    from detectron2.config import LazyConfig

    try:
        cfg = LazyConfig.load(args.config_file)
    except (SyntaxError, ImportError) as error:
        where = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"{args.config_file}: {error}{where}") from error
    parts = EVALUATED if getattr(args, "eval_only", True) else TRAINED
    missing = [part for part in parts if part not in cfg]
    if missing:
        raise ValueError(
            f"{args.config_file}: a config is made of {', '.join(parts)}; there is no "
            f"{', '.join(missing)}"
        )
    for option in args.opts:
        if option != "--":
            _apply(cfg, option)
    cfg.train.device = _detectron2.available_device(cfg.train.device)
    return cfg


def _apply(cfg: Any, option: str) -> None:
    from detectron2.config import LazyConfig
    from omegaconf import OmegaConf

    key, equals, _ = option.partition("=")
    if key.startswith("--"):
        raise ValueError(f"flags stand before the first key=value: {key} came later")
    if not equals or key.startswith(("~", "+")):
        raise ValueError(f"options of Python configs are written key=value, got {option!r}")
    _check_key(cfg, key)
    old = OmegaConf.select(cfg, key)
    try:
        LazyConfig.apply_overrides(cfg, [option])
    except Exception as error:
        if type(error).__module__.startswith("hydra"):
            raise ValueError(f"{option}: {str(error).splitlines()[0]}") from error
        raise
    new = OmegaConf.select(cfg, key)
    if OmegaConf.is_dict(old) and not OmegaConf.is_dict(new):
        raise ValueError(f"{option}: {key} is a section with the keys {', '.join(old)}")
    if isinstance(old, (bool, int, float)) and isinstance(new, str):
        kind = "True or False" if isinstance(old, bool) else "a number"
        raise ValueError(f"{option}: {key} must be {kind}, as {old} is")


def _check_key(cfg: Any, key: str) -> None:
    from omegaconf import OmegaConf

    node = cfg
    for name in key.split("."):
        allowed = node.keys() if OmegaConf.is_dict(node) else ()
        if OmegaConf.is_list(node):
            allowed = map(str, range(len(node)))
        allowed = list(allowed)
        if name not in allowed:
            if "_target_" in allowed:
                return  # an argument that the class has a default for
            close = difflib.get_close_matches(name, allowed, 3) or allowed or ["no keys"]
            raise ValueError(f"there is no config key {key!r}: {name!r} is none of "
                             f"{', '.join(close)}")  # fmt: skip
        node = node[int(name) if OmegaConf.is_list(node) else name]


def build_model(cfg: Any) -> Any:
    """Build the model.

    Raises:
        ValueError: The heads read levels that the pyramid doesn't have.
    """
    from detectron2.config import instantiate
    from omegaconf import OmegaConf

    model = instantiate(cfg.model)
    levels = getattr(model, "backbone", model)
    levels = levels.output_shape() if hasattr(levels, "output_shape") else {}
    for key in LEVELS if levels else ():
        wanted = OmegaConf.select(cfg, f"model.{key}") or ()
        missing = [name for name in wanted if name not in levels]
        if missing:
            strides = {name: shape.stride for name, shape in levels.items()}
            raise ValueError(
                f"model.{key} asks for {missing}, but the pyramid has the levels and strides "
                f"{strides}; model.backbone.net.blocks says what it stands on"
            )
    return model.to(cfg.train.device)


LEVELS = (
    "proposal_generator.in_features",
    "roi_heads.box_in_features",
    "roi_heads.mask_in_features",
    "head_in_features",
)
"""Where a config names the levels that R-CNNs and one-stage detectors read."""


def test(cfg: Any, model: Any) -> Any:
    """Evaluate, where the config has an evaluator."""
    from detectron2.config import instantiate
    from detectron2.evaluation import inference_on_dataset, print_csv_format

    if "evaluator" not in cfg.dataloader:
        return None
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def train(args: argparse.Namespace, cfg: Any) -> None:
    """Train."""
    from detectron2.config import instantiate
    from detectron2.engine import default_writers, hooks
    from detectron2.utils import comm

    from diffbackbone.detectron2 import engine

    seeding = engine.SeedIterations(cfg.dataloader.train.get("seed", 0))
    engine.seed_everything(seeding.seed)
    model = build_model(cfg)
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
            engine.CheckpointHook(checkpointer, **cfg.train.checkpointer) if main else None,
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
    if _locate(loader._target_) is engine.build_train_loader:
        loader.seed, loader.start_iter = seeding.seed, start

    def build_loader() -> Any:
        with engine.naming_damaged(_dataset_names(cfg, "train")):
            return instantiate(loader)

    trainer.reset_data_loader(build_loader)
    trainer.train(start, cfg.train.max_iter)


def _locate(target: Any) -> Any:
    """A config's target, which it holds by itself or, if it was a file once, by name."""
    from detectron2.utils.registry import locate

    return locate(target) if isinstance(target, str) else target


def main(args: argparse.Namespace) -> Any:
    """One process of a run; see :func:`train_net.main`."""
    _detectron2.prepare()
    from detectron2.engine import default_setup

    from diffbackbone.detectron2.engine import Checkpointer

    cfg = load(args)
    default_setup(cfg, args)
    if not args.eval_only:
        return train(args, cfg)
    model = build_model(cfg)
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
    from diffbackbone.detectron2.engine import check_datasets

    cfg = load(args)
    trained, evaluated = (_dataset_names(cfg, part) for part in ("train", "test"))
    if args.eval_only and "evaluator" not in cfg.dataloader:
        raise ValueError("dataloader.evaluator is missing: there is nothing to evaluate with")
    names = evaluated if args.eval_only else [*trained, *evaluated]
    check_datasets(names)
    _detectron2.check_evaluation(evaluated)
    _check_classes(cfg, names)
    train = cfg.train
    found = _detectron2.check_weights(train.init_checkpoint, train.output_dir, args.resume)
    if args.eval_only and not found:
        raise ValueError(
            "--eval-only needs train.init_checkpoint=CHECKPOINT, or --resume for the last "
            f"checkpoint in train.output_dir, {train.output_dir}"
        )


def _dataset_names(cfg: Any, part: str) -> list[str]:
    from omegaconf import OmegaConf

    names = OmegaConf.select(cfg, f"dataloader.{part}.dataset.names") or []
    return [names] if isinstance(names, str) else list(names)


def _check_classes(cfg: Any, names: Sequence[str]) -> None:
    from detectron2.data import MetadataCatalog
    from omegaconf import OmegaConf

    for key in ("model.roi_heads.num_classes", "model.num_classes"):  # R-CNN, one-stage detectors
        given = OmegaConf.select(cfg, key)
        for name in names:
            classes = MetadataCatalog.get(name).get("thing_classes")
            if given is not None and classes is not None and len(classes) != given:
                raise ValueError(
                    f"{key} is {given}, but dataset {name!r} has {len(classes)} thing_classes"
                )


def entry(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    _detectron2.prepare()
    args = _detectron2.parse_args(argv, ".py", __doc__)
    with _detectron2.clear_errors():
        check(args)
        _detectron2.run(main, args)


if __name__ == "__main__":
    entry()
