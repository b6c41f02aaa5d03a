"""Train and evaluate classification heads; see :mod:`diffbackbone.eval.recipes` for the options."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from diffbackbone.checkpoint import CheckpointError
from diffbackbone.checkpoint import read_checkpoint as read_weights
from diffbackbone.cli import run_command
from diffbackbone.eval.data import ImageFolder, choose_subset
from diffbackbone.eval.features import FeatureCache, FeatureSpec, open_caches
from diffbackbone.eval.options import build_backbone, check_settings
from diffbackbone.eval.plots import draw_confusion
from diffbackbone.eval.recipes import RECIPES, ClassifierConfig, resolve
from diffbackbone.eval.trainer import FORMAT, Classifier, DivergedError, Trainer
from diffbackbone.heads import (
    build_head,
    convert_published_feedback,
    convert_published_head,
    published_options,
)
from diffbackbone.utils import UserError, save_figure, settings_of, write_json

_TRAINING_FILES = ("last.pt", "best.pt", "metrics.jsonl")
_MAY_CHANGE = {  # on resume, and between training and evaluation
    "data", "train_dir", "val_dir", "workers", "device", "cache", "overwrite_cache", "out",
    "resume", "evaluate", "epochs", "recipe", "checkpoint", "eval_every", "log_with",
}  # fmt: skip


def run(config: ClassifierConfig, caches: Sequence[FeatureCache] | None = None) -> dict[str, Any]:
    """Train, or continue, and evaluate; return the content of ``results.json``.

    Where held-out images select, the selection is in OUT/search and OUT has the head that is then
    trained on all training images. Without ``caches`` of training and validation images those that
    the options name are opened.
    """
    saved = None
    if config.evaluate is not None:
        saved = read_weights(config.evaluate, mapped=False)
        if not isinstance(saved, dict) or "model_head" not in saved:
            saved = read_checkpoint(config.evaluate)
            config = saved_config(config, saved)
        elif config.published is not None:
            config = published_config(config)
    config = resolve(config)
    _check_out(config)
    if saved is None and config.select_on == "heldout":
        choice = _search(config, caches)
        given = {name: choice.pop(name) for name in ("lr", "epoch")}
        config = replace(config, lr=(given["lr"],), epochs=given["epoch"], select_on="none")
        return _run(config, caches, None, choice)
    return _run(config, caches, saved)


def _search(config: ClassifierConfig, caches: Sequence[FeatureCache] | None) -> dict[str, Any]:
    """Train all learning rates on a part of the training images, and return the best's results.

    Heads on one frozen U-Net are trained together, others one after the other.
    """
    folder = config.out / "search"
    runs = [replace(config, out=folder)]
    if config.feedback != "none" or config.finetune:
        runs = [replace(config, out=folder / f"lr-{lr:g}", lr=(lr,)) for lr in config.lr]
    for one in runs:
        _check_out(one)
    found: list[dict[str, Any]] = []
    for one in runs:
        try:
            found.append(_run(one, caches, None))
        except DivergedError:
            if one is runs[-1] and not found:
                raise
    best = max(found, key=lambda results: results["key"])
    return {name: best[name] for name in ("lr", "epoch", "heldout", "selected_on")}


def _run(
    config: ClassifierConfig,
    caches: Sequence[FeatureCache] | None,
    saved: Mapping[str, Any] | None,
    choice: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train one head, or several together, or evaluate a saved one; write the results."""
    compute = config.compute_dtype(config.start().device)
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="bf16" if compute else "no",
        log_with=None if config.log_with == "none" else config.log_with,
        project_dir=str(config.out),
    )
    train, val = config.list_folders(config.network().in_channels)
    if config.subset:
        train = train.subset(choose_subset(train, config.subset, config.seed))
    accelerator.print(f"{len(train.classes)} classes, {len(train)} training, {len(val)} val images")
    spec = FeatureSpec.of(config, config.pool, accelerator.state)
    spec.batch = math.ceil(config.batch_size / accelerator.num_processes / config.accumulate)
    model = build_model(config, len(train.classes), spec)
    settings = _settings(config, train, val)
    resumed = None
    if saved is None and config.resume and (config.out / "last.pt").is_file():
        resumed = read_checkpoint(config.out / "last.pt")
        check_settings(config.out, resumed["settings"], settings, _MAY_CHANGE)
    for content in filter(None, (saved, resumed)):
        if "backbone" in content:  # before features are computed with it
            model.backbone.load_state_dict(content["backbone"])
    if caches is None and config.cache is not None:
        mirrored = {"train"} if config.augment == "flip" else ()
        folders, state = {"train": train, "val": val}, accelerator.state
        caches = open_caches(config, folders, model.backbone, spec, state, mirrored)
    elif caches is None and accelerator.is_main_process:
        train.check()
        val.check()
    accelerator.wait_for_everyone()
    trainer = Trainer(config, accelerator, model, train, val, caches, settings)
    if saved is None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) // len(config.lr)
        accelerator.print(f"{trained:,} trained parameters")
        trainer.prepare(resumed)
        trainer.fit()
        results = {"trained_parameters": trained, "selected_on": config.select_on}
        results |= {name: value for name, value in trainer.best.items() if name != "index"}
        confusion = results.pop("confusion").numpy()
        results |= {"settings": settings, **(choice or {})}
    else:
        _load_head(trainer, saved)
        trainer.prepare()
        scores = trainer.evaluate()[0]
        results = {"evaluated": str(config.evaluate), "val": scores.compute()}
        confusion = scores.confusion().numpy()
    out, found = config.out, results["val"]
    if accelerator.is_main_process:
        save_figure(draw_confusion(confusion, train.classes), out / "confusion.png")
        write_json(out / "results.json", {**results, "confusion": confusion.tolist()})
    accelerator.print(
        f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%} of {found['images']} images\n"
        f"{out}: results.json, confusion.png"
    )
    accelerator.wait_for_everyone()
    return results


def _load_head(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Load a best head, or head and feedback layers of the published code."""
    path, published = trainer.config.evaluate, trainer.config.published
    head, feedback = trainer.model.heads[0], trainer.model.backbone.feedback
    if "model_head" not in saved:
        if saved["settings"]["classes"] != trainer.settings["classes"]:
            raise UserError(f"{path} was trained on other classes than the data has")
        head.load_state_dict(saved["head"])
        return
    weights = saved.get("model_feedback") or {}
    if unknown := saved.keys() & {"model_update", "model_fpn"}:
        raise UserError(f"{path}: {', '.join(sorted(unknown))} can't be converted")
    if bool(weights) != (feedback is not None):
        raise UserError(f"{path} was trained {'with' if weights else 'without'} --feedback")
    try:
        if feedback is not None:
            sources = published_options(published)["feedback"] if published else feedback.mapping
            feedback.load_state_dict(convert_published_feedback(weights, sources))
        head.load_state_dict(convert_published_head(saved, head))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path} doesn't fit the options: {error}") from error


def build_model(config: ClassifierConfig, classes: int, spec: FeatureSpec) -> Classifier:
    """Build the backbone, and a head for each learning rate; all heads start the same."""
    backbone = build_backbone(
        config,
        None if config.feedback == "none" else config.feedback,
        not config.finetune,
        activation_checkpointing=config.activation_checkpointing,
        feedback_layers=config.feedback_layers,
    )
    blocks = dict.fromkeys((*config.blocks, *config.first_blocks))
    infos = [backbone.unet.blocks[b] for b in backbone.unet.blocks.check(blocks)]
    channels: Any = [info.channels for info in infos]
    sizes = [math.ceil(config.image_size / info.stride) for info in infos]
    names = ["pool", *(["hidden"] if config.hidden else [])]
    options: dict[str, Any] = {}
    if config.head in ("attention", "difformer"):
        names += ["width", "layers", "num_heads", "mlp_ratio", "norm", "readout"]
        if config.published is not None:
            options.update(published_options(config.published)["head_options"])
    if config.head == "difformer":
        names += ["blocks", "timesteps", "first_blocks"]
        options["sizes"] = sizes
    else:
        (channels,) = channels
    if config.head == "attention":
        names.append("proj")
        (options["size"],) = sizes
    options = {name: getattr(config, name) for name in names} | options
    built = []
    for _ in config.lr:
        torch.manual_seed(config.seed + 1)
        built.append(build_head(config.head, channels, classes, **options))
    return Classifier(backbone, built, spec)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a best.pt or last.pt: weights and plain values, no code."""
    content = read_weights(path, mapped=False)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of tools/train_classifier.py")
    return content


def saved_config(config: ClassifierConfig, saved: Mapping[str, Any]) -> ClassifierConfig:
    """Return the options, with those that determine the model of a checkpoint replaced by its."""
    settings = saved["settings"]
    names = {field.name for field in fields(config)} & settings.keys() - _MAY_CHANGE
    values = {name: settings[name] for name in names}
    values |= {"lr": [saved["best"]["lr"]], "select_on": "none", "subset": None}
    return replace(config, **{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def published_config(config: ClassifierConfig) -> ClassifierConfig:
    """Return the options, with those that the published code's determine replaced."""
    try:
        options = published_options(config.published or "")
    except ValueError as error:
        raise UserError(f"--published: {error}") from error
    pairs = ",".join(f"{b}:{target}" for b, target in (options.pop("feedback") or {}).items())
    del options["head_options"]
    return replace(config, feedback=pairs or "none", **options)


def _check_out(config: ClassifierConfig) -> None:
    """Keep training runs and evaluations apart."""
    files = _TRAINING_FILES if config.evaluate else (*_TRAINING_FILES, "results.json")
    checked = config.evaluate or not config.resume
    if checked and any((config.out / name).is_file() for name in files):
        raise UserError(f"{config.out} already holds a run: use another --out, or --resume")


def _settings(config: ClassifierConfig, train: ImageFolder, val: ImageFolder) -> dict[str, Any]:
    settings = settings_of(config)
    for split, images in (("train", train), ("val", val)):
        names = json.dumps([images.paths, images.labels.tolist()])
        settings[f"{split}_images"] = len(images)
        settings[f"{split}_sha256"] = hashlib.sha256(names.encode()).hexdigest()
    return {**settings, "classes": list(train.classes)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the recipe gives the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default="probe")
    known, _ = parser.parse_known_args(argv)
    default = RECIPES.get(known.recipe, RECIPES["probe"])
    run_command(ClassifierConfig, run, argv, default=default)
    PartialState().destroy_process_group()
