"""Segmentation by Hugging Face transformers: UperNet on a folder of images and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from accelerate.utils import broadcast
from matplotlib import colormaps
from matplotlib.figure import Figure
from torchmetrics.classification import MulticlassConfusionMatrix

from diffbackbone.cli import run_command
from diffbackbone.hf_data import VOID, Scenes, find_data, random_crop
from diffbackbone.sources import PACKAGED, RELEASED_CHECKPOINTS
from diffbackbone.transformers import DiffusionBackboneConfig, DiffusionImageProcessor
from diffbackbone.utils import UserError, save_figure, write_json


@dataclass
class SegmentationConfig:
    """Fine-tune UperNet by transformers' Trainer, evaluate it and draw its predictions.

    The defaults are for the sample data, on a CPU.
    """

    data: Path = Path("data/sample")
    """Folder with `images/` and `annotations/` (or `masks/`), either both with `training/` and
    `validation/` or both without; then every fifth image is kept for the evaluation. A mask is a
    PNG of class numbers, named as its image; 255 is void. `classes.txt` may name the classes, one a
    line. ADE20K is read as it comes."""
    out: Path = Path("work_dirs/hf_segmentation")
    """Folder for checkpoints, the model, its figures and the picture."""
    resume: bool = False
    """Go on from the last checkpoint in `out`."""
    ignore_zero: bool = False
    """Label 0 is void, and label 1 the first class, as in ADE20K."""
    unet: str = "tiny"
    """Preset of the U-Net, for example gd256_uncond."""
    checkpoint: str | None = None
    """Path or URL of its weights; None takes the preset's own, "random" none."""
    timestep: int = 90
    """Timestep t, 0-based."""
    blocks: tuple[int, ...] = (33, 30, 27, 24)
    """Tapped blocks, 1-based, from fine to coarse."""
    feedback: str | None = "bottleneck"
    """DifFeed: all, bottleneck, windowed or multi-scale; None for a single pass."""
    out_channels: int = 64
    """Channels of the maps, in the paper 1024."""
    out_strides: tuple[int, ...] = (2, 4, 8, 16)
    """Strides of the maps; 4 8 16 32 for crops of 512 px."""
    freeze: bool = False
    """Train everything but the U-Net."""
    activation_budget: float | None = None
    """GB of activations that the U-Net may keep; more blocks are recomputed instead."""
    hidden_size: int = 64
    """Channels of UperNet, in the paper 1024."""
    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 8
    """Images in a batch, on each device."""
    lr: float = 2e-3
    """Learning rate after the warm-up, from where it falls linearly to 0."""
    crop: int = 64
    """Side of the training crops in pixels."""
    augment: bool = False
    """Flip and scale the images, so that the longer side is one to three crops long."""
    seed: int = 0
    """Seed of weights, order and crops."""
    trainer: tuple[str, ...] = ()
    """Further TrainingArguments, for example bf16=true gradient_accumulation_steps=4."""


def build_model(config: SegmentationConfig, classes: Sequence[str]) -> torch.nn.Module:
    """Build UperNet on the backbone, with the U-Net's weights."""
    own = RELEASED_CHECKPOINTS.get(config.unet, f"{PACKAGED}{config.unet}.safetensors")
    names = ("unet", "timestep", "blocks", "feedback", "out_channels", "out_strides", "freeze")
    names += ("activation_budget",)
    backbone = DiffusionBackboneConfig(
        checkpoint=None if config.checkpoint == "random" else config.checkpoint or own,
        out_indices=list(range(len(config.blocks))),
        **{name: getattr(config, name) for name in names},
    )
    upernet = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=config.hidden_size,
        auxiliary_channels=config.hidden_size,
        use_auxiliary_head=len(config.blocks) > 2,  # it reads the third map
        initializer_range=config.hidden_size**-0.5,
        loss_ignore_index=VOID,
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    model = transformers.UperNetForSemanticSegmentation(upernet)
    model.accepts_loss_kwargs = False  # its loss is a mean, which the Trainer must know
    return model


class SegmentationTrainer(transformers.Trainer):
    """Trainer that evaluates whole images, each at its own size, by their mean IoU."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the names of the weights that decay: all but norms and biases."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    @torch.no_grad()
    def predict_labels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the classes (H, W) of an image (3, H, W)."""
        self.model.eval()
        with self.accelerator.autocast():
            return self.model(pixels[None].to(self.args.device)).logits[0].argmax(0)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean IoU and that of each class; processes share the images."""
        broadcast(list(self.model.buffers()))  # batch norm's statistics differ between processes
        classes = self.model.config.id2label
        metric = MulticlassConfusionMatrix(len(classes), ignore_index=VOID).to(self.args.device)
        for index in range(self.args.process_index, len(self.eval_dataset), self.args.world_size):
            scene = self.eval_dataset[index]
            metric.update(
                self.predict_labels(scene["pixel_values"]), scene["labels"].to(metric.device)
            )
        counts = metric.compute().double()
        ious = 100 * counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
        metrics = {"eval_miou": ious.nanmean().item()}  # NaN is a class that there is not
        metrics |= {f"eval_iou_{classes[i]}": iou for i, iou in enumerate(ious.tolist())}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def draw(trainer: SegmentationTrainer, count: int = 6) -> Figure:
    """Draw some images of the evaluation, their labels and the predictions."""
    data, classes = trainer.eval_dataset, trainer.model.config.id2label
    chosen = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    figure = Figure(figsize=(8, 2.4 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 3, squeeze=False)
    look = {"vmin": -0.5, "vmax": len(classes) - 0.5, "interpolation": "nearest"}
    look["cmap"] = colormaps["nipy_spectral"].resampled(len(classes)).with_extremes(over="white")
    for row, scene in zip(axes, (data[int(index)] for index in chosen)):
        pixels, labels = scene.values()
        row[0].imshow((pixels.permute(1, 2, 0).numpy() + 1) / 2)
        row[1].imshow(labels.numpy(), **look)
        shown = row[2].imshow(trainer.predict_labels(pixels).cpu().numpy(), **look)
        for axis, title in zip(row, ("image", "labels", "prediction")):
            axis.set_title(title)
            axis.set_axis_off()
    bar = figure.colorbar(shown, ax=axes, ticks=range(len(classes)), shrink=0.5)
    bar.ax.set_yticklabels(classes.values(), fontsize=7)
    return figure


def run(config: SegmentationConfig) -> dict[str, float]:
    """Train, evaluate, save and draw; return the metrics."""
    training, validation, classes, ignore_zero = find_data(config.data, config.ignore_zero)
    # the Trainer writes the state last, so a checkpoint without it is not whole
    states = config.out.glob("checkpoint-*/trainer_state.json")
    steps = sorted(int(state.parent.name.split("-")[1]) for state in states)
    if steps and not config.resume:
        raise UserError(f"{config.out} holds a run: go on with --resume, or name another --out")
    settings = {
        "output_dir": str(config.out),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": config.steps // 12,
        "weight_decay": 0.05,
        "train_sampling_strategy": "sequential",  # the data set shuffles
        "dataloader_num_workers": 1,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "logging_steps": 20,
        "eval_strategy": "steps",
        "eval_steps": config.steps // 2 + 1,  # the last evaluation comes after the training
        "save_steps": max(1, config.steps // 4),
        "save_total_limit": 2,
        "seed": config.seed,
        "report_to": "none",
    }
    for name, value in (argument.split("=", 1) for argument in config.trainer):
        settings[name] = yaml.safe_load(value)
    transformers.set_seed(config.seed)
    args = transformers.TrainingArguments(**settings)
    model = build_model(config, classes)
    if args.world_size > 1 and args.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    count = config.steps * args.train_batch_size * args.gradient_accumulation_steps
    crops = {"augment": random_crop(config.crop, config.augment), "count": count * args.world_size}
    trainer = SegmentationTrainer(
        model,
        args,
        train_dataset=Scenes(training, len(classes), ignore_zero, **crops, seed=config.seed),
        eval_dataset=Scenes(validation, len(classes), ignore_zero),
    )
    trainer.train(str(config.out / f"checkpoint-{steps[-1]}") if steps else None)
    trainer.save_model(str(config.out / "model"))
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        (config.out / "model" / "training_args.bin").unlink()  # a pickle with local paths
        DiffusionImageProcessor(do_resize=False).save_pretrained(config.out / "model")
        write_json(config.out / "metrics.json", metrics)
        save_figure(draw(trainer), config.out / "predictions.png")
        print(
            f"{config.out}: model, metrics.json (mIoU {metrics['eval_miou']:.1f}), predictions.png"
        )
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(SegmentationConfig, run, argv)
