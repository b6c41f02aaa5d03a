"""Train and evaluate with Detectron2's YAML configs, as its own tools/train_net.py does.

For instance::

    python tools/train_net.py --config mask_rcnn_gd_t75_b24.yaml --num-gpus 4
    python tools/train_net.py --config mask_rcnn_gd_t75_b24.yaml --resume
    python tools/train_net.py --config mask_rcnn_gd_t75_b24.yaml --eval-only \
        MODEL.WEIGHTS output/model_final.pth
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import _detectron2


def main(args: argparse.Namespace) -> Any:
    """One process of a run.

    Args:
        args: See :func:`_detectron2.parse_args`.

    Returns:
        The results of the last evaluation.
    """
    _detectron2.prepare()
    from detectron2.engine import default_setup
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from diffbackbone.detectron2.engine import Checkpointer, Trainer

    cfg = _detectron2.load_yaml(args.config_file, args.opts)
    default_setup(cfg, args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, strict=True)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def check(args: argparse.Namespace) -> None:
    """Look at everything that a run will need, before it starts.

    Raises:
        ValueError: A key, a value or a dataset's name is wrong.
        FileNotFoundError: Data are missing.
        SystemExit: A checkpoint is missing.
    """
    from diffbackbone.detectron2 import engine

    cfg = _detectron2.load_yaml(args.config_file, args.opts)
    engine.check_supported(cfg)
    if args.eval_only and not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: there is nothing to evaluate on")
    engine.check_datasets((*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST))
    for name in cfg.DATASETS.TEST:
        engine.evaluator_type(name)
    _detectron2.check_evaluation(cfg.DATASETS.TEST)
    engine.check_classes(_without_training(cfg) if args.eval_only else cfg)
    found = _detectron2.check_weights(cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, args.resume)
    if args.eval_only and not found:
        raise ValueError(
            "--eval-only needs MODEL.WEIGHTS CHECKPOINT, or --resume for the last checkpoint in "
            f"OUTPUT_DIR, {cfg.OUTPUT_DIR}"
        )


def _without_training(cfg: Any) -> Any:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = ()
    return cfg


def entry(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    _detectron2.prepare()
    args = _detectron2.parse_args(argv, ".yaml", __doc__)
    with _detectron2.clear_errors():
        check(args)
        _detectron2.run(main, args)


if __name__ == "__main__":
    entry()
