"""Train and evaluate with Detectron2's YAML configs, as its own tools/train_net.py does.

For instance: python tools/train_net.py --config mask_rcnn_gd_t75_b24.yaml --num-gpus 4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from diffbackbone.detectron2.checkpoint import Checkpointer
from diffbackbone.detectron2.config import load_yaml
from diffbackbone.detectron2.engine import Trainer
from diffbackbone.detectron2.launch import run_training


def run(args: argparse.Namespace) -> Any:
    """Run one process; return the results of the last evaluation."""
    cfg = load_yaml(args.config_file, args.opts)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_training(argv, (".yaml", ".yml"), __doc__, run)
