"""The command ``diffbackbone COMMAND ...``, also ``python -m diffbackbone COMMAND ...``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train-net": ("detectron2.train_net:main", "train and evaluate with Detectron2"),
    "lazyconfig-train-net": ("detectron2.lazyconfig_train_net:main", "... with Python configs"),
    "visualize-predictions": ("detectron2.visualize:main", "draw a detector's predictions"),
    "mmseg-train": ("openmmlab.commands:train", "train with MMSegmentation"),
    "mmseg-test": ("openmmlab.commands:evaluate", "evaluate with MMSegmentation"),
    "mmseg-visualize": ("openmmlab.visualize:main", "draw a segmenter's predictions"),
    "hf-segmentation": ("hf_segmentation:main", "train and evaluate UperNet of transformers"),
    "classify": ("eval.classify:main", "train and evaluate a classification head"),
    "knn": ("eval.knn:main", "classify by nearest neighbors in frozen features"),
    "sweep": ("eval.sweep:main", "find the block and timestep that suit a data set"),
    "evaluate-classifier": (
        "eval.evaluate_classifier:main",
        "measure guided-diffusion's classifiers",
    ),
    "compare": ("eval.compare:main", "compare networks on a data set"),
    "prepare-fgvc": ("eval.fgvc:main", "sort a fine-grained data set into class folders"),
    "label-efficiency": ("eval.label_efficiency:main", "compare weights with few labels"),
    "visualize-features": ("eval.visualize_features:main", "draw principal components"),
    "inspect": ("inspect_unet:main", "print what each block costs"),
    "pretrain": ("pretrain.training:main", "train a U-Net on images without labels"),
    "sample": ("pretrain.sample:main", "generate images with a U-Net, and measure their FID"),
    "export": ("export:main", "write torch.export, ONNX, safetensors or diffusers' format"),
    "benchmark": ("benchmark.timing:main", "time the backbone and training steps"),
    "sample-data": ("sample_data.dataset:main", "make scenes in ADE20K's and COCO's layout"),
    "sample-digits": ("sample_data.digits:main", "make images for classification"),
}
"""Function, relative to the package, and description of each command."""


def main() -> None:
    """Run the command that the process's first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        lines = [f"  {command:22} {text}" for command, (_, text) in COMMANDS.items()]
        print("usage: diffbackbone COMMAND [--help | ...]\n", *lines, sep="\n")
        raise SystemExit(0 if name in ("--help", "-h") else f"\nerror: no command {name!r}")
    module, function = COMMANDS[name][0].split(":")
    sys.argv = [f"diffbackbone {name}", *sys.argv[2:]]
    getattr(importlib.import_module(f"diffbackbone.{module}"), function)()


if __name__ == "__main__":
    main()
