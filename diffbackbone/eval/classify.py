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
from torch import Tensor, nn

from diffbackbone.checkpoint import CheckpointError
from diffbackbone.checkpoint import read_checkpoint as read_weights
from diffbackbone.cli import run_command
from diffbackbone.eval.data import ImageFolder, check_images, choose_subset
from diffbackbone.eval.features import FeatureCache, FeatureSpec, open_features
from diffbackbone.eval.options import build_backbone
from diffbackbone.eval.plots import draw_confusion
from diffbackbone.eval.recipes import RECIPES, ClassifierConfig, resolve
from diffbackbone.eval.trainer import FORMAT, Classifier, Source, Trainer
from diffbackbone.heads import build_head, convert_published_head
from diffbackbone.utils import UserError, changed_settings, save_figure, settings_of, write_json

_TRAINING_FILES = ("last.pt", "best.pt", "metrics.jsonl")
_MAY_CHANGE = {  # on resume, and between training and evaluation
    "data", "train_dir", "val_dir", "workers", "device", "cache", "overwrite_cache", "out",
    "resume", "evaluate", "epochs", "recipe", "checkpoint", "eval_every", "log_with",
}  # fmt: skip


def run(
    config: ClassifierConfig, caches: tuple[FeatureCache, FeatureCache] | None = None
) -> dict[str, Any]:
    """Train, or continue, and evaluate.

    Args:
        config: Options.
        caches: Features of the training and validation images (and of others, perhaps) at these
            taps at least; None opens those that the options name.

    Returns:
        The content of ``results.json``.

    Raises:
        UserError: The options, data and weights don't go together.
    """
    saved = None
    if config.evaluate is not None:
        saved = read_weights(config.evaluate, mapped=False)
        if not isinstance(saved, dict) or "model_head" not in saved:
            saved = read_checkpoint(config.evaluate)
            config = saved_config(config, saved)
    config = resolve(config)
    _check_out(config)
    compute = config.compute_dtype(config.start().device)
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="bf16" if compute else "no",
        log_with=None if config.log_with == "none" else config.log_with,
        project_dir=str(config.out),
    )
    train, val = config.list_folders()
    if config.subset:
        train = choose_subset(train, config.subset, config.seed)
    accelerator.print(f"{len(train.classes)} classes, {len(train)} training, {len(val)} val images")
    if absent := len(train.classes) - len(set(val.listing.labels)):
        accelerator.print(f"warning: {absent} classes have no validation image")
    spec = FeatureSpec(
        config.timesteps, config.blocks, config.image_size, config.pool, config.feature_dtype,
        compute, math.ceil(config.batch_size / accelerator.num_processes / config.accumulate),
    )  # fmt: skip
    model = build_model(config, len(train.classes), spec)
    settings = _settings(config, train, val)
    resumed = _read_resumed(config, settings)
    for content in filter(None, (saved, resumed)):
        if "backbone" in content:  # before features are computed with it
            load_weights(model.backbone, content["backbone"])
    if caches is None and config.cache is not None:
        caches = _open_caches(config, model, train, val, accelerator)
    elif caches is None and accelerator.is_main_process:
        check_images(train)
        check_images(val)
    accelerator.wait_for_everyone()
    train_cache, val_cache = caches or (None, None)
    sources = Source(train, train_cache), Source(val, val_cache)
    trainer = Trainer(config, accelerator, model, *sources)
    if saved is not None:
        return _evaluate(trainer, saved, settings)
    return _train(trainer, resumed, settings)


def _read_resumed(
    config: ClassifierConfig, settings: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Read the run to continue, if there is one, and check that its settings are the same."""
    last = config.out / "last.pt"
    if config.evaluate is not None or not config.resume or not last.is_file():
        return None
    saved = read_checkpoint(last)
    if changes := changed_settings(saved["settings"], settings, _MAY_CHANGE):
        raise UserError(f"{config.out} is a run of other settings:\n  " + "\n  ".join(changes))
    return saved


def _train(
    trainer: Trainer, saved: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    config = trainer.config
    if saved is not None:
        trainer.accelerator.print(f"resumed after epoch {len(saved['history'])}")
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trained //= len(config.lr)
    trainer.accelerator.print(f"{trained:,} trained parameters")
    trainer.prepare(saved)
    trainer.fit(settings)
    best = trainer.best
    assert best is not None
    results = {
        "trained_parameters": trained,
        "selected_on": config.select_on,
        "lr": best["lr"],
        "epoch": best["epoch"],
        "val": best["val"],
        "learning_rates": [_best_epoch(trainer, index) for index in range(len(config.lr))],
        "settings": dict(settings),
        "seconds": {
            "train_epochs": [record["seconds"]["train"] for record in trainer.history],
            "total": sum(sum(record["seconds"].values()) for record in trainer.history),
        },
    }
    _write_results(trainer, results, best["confusion"])
    for rate in results["learning_rates"]:
        scores = ", ".join(f"{k} {v:.2%}" for k, v in rate.items() if k.endswith("top1"))
        trainer.accelerator.print(f"lr {rate['lr']:g}, epoch {rate['epoch']}: {scores}")
    if config.select_on == "val":
        trainer.accelerator.print("note: selected on the validation images, so these are too good")
    return results


def _best_epoch(trainer: Trainer, index: int) -> dict[str, Any]:
    """Return the selected epoch of a learning rate, and its scores."""
    evaluated = [record for record in trainer.history if "val" in record]
    top = evaluated[-1]
    if trainer.config.select_on != "none":
        top = max(evaluated, key=lambda record: trainer.key(record, index))  # the first of equals
    scores = {"val_top1": top["val"][index]["top1"], "val_top5": top["val"][index]["top5"]}
    if "heldout" in top:
        scores["heldout_top1"] = top["heldout"][index]["top1"]
    return {"lr": trainer.config.lr[index], "epoch": top["epoch"], **scores}


def _evaluate(
    trainer: Trainer, saved: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    config, model = trainer.config, trainer.model
    if "model_head" in saved:
        try:
            head = convert_published_head(saved, model.heads[0])
        except ValueError as error:
            raise UserError(f"{config.evaluate}: {error}") from error
        if saved.get("model_feedback"):
            raise UserError(f"{config.evaluate}: the published code's feedback is not converted")
    else:
        if saved["settings"]["classes"] != settings["classes"]:
            raise UserError(f"{config.evaluate} was trained on other classes than the data has")
        head = saved["head"] if "head" in saved else saved["heads"][_selected(saved)]
    load_weights(model.heads[0], head)
    trainer.prepare()
    scores = trainer.evaluate()
    results = {"evaluated": str(config.evaluate), "val": scores.compute()[0]}
    _write_results(trainer, results, scores.confusion(0))
    return results


def _write_results(trainer: Trainer, results: Mapping[str, Any], confusion: Tensor) -> None:
    out, val = trainer.config.out, results["val"]
    if trainer.accelerator.is_main_process:
        figure = draw_confusion(confusion.numpy(), trainer.val.images.classes)
        save_figure(figure, out / "confusion.png")
        write_json(out / "results.json", {**results, "confusion": confusion.tolist()})
    trainer.accelerator.print(
        f"val: top-1 {val['top1']:.2%}, top-5 {val['top5']:.2%} of {val['images']} images\n"
        f"{out}: results.json, confusion.png"
    )
    trainer.accelerator.wait_for_everyone()


def build_model(config: ClassifierConfig, classes: int, spec: FeatureSpec) -> Classifier:
    """Build the backbone, and a head for each learning rate; all heads start the same.

    Raises:
        UserError: The head does not fit the taps.
    """
    backbone = build_backbone(
        config,
        None if config.feedback == "none" else config.feedback,
        not config.finetune,
        activation_checkpointing=config.activation_checkpointing,
    )
    infos = [backbone.unet.config.blocks[b] for b in config.blocks]
    channels = [info.channels for info in infos]
    sizes = [math.ceil(config.image_size / info.stride) for info in infos]
    several = config.head == "difformer"
    options: dict[str, Any] = {"pool": config.pool}
    if config.hidden:
        options["hidden"] = config.hidden
    if config.head in ("attention", "difformer"):
        options.update(width=config.width, layers=config.layers, num_heads=config.num_heads)
    if config.head == "attention":
        options["size"] = sizes[0]
    if several:
        options.update(sizes=sizes, blocks=config.blocks, timesteps=config.timesteps)
    built = []
    for _ in config.lr:
        torch.manual_seed(config.seed + 1)
        try:
            first = channels if several else channels[0]
            built.append(build_head(str(config.head), first, classes, **options))
        except ValueError as error:
            raise UserError(f"--head {config.head}: {error}") from error
    return Classifier(backbone, built, spec)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a best.pt or last.pt: weights and plain values, no code.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: The file is damaged, holds code, or is something else.
    """
    content = read_weights(path, mapped=False)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of tools/train_classifier.py")
    return content


def load_weights(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load the weights of a head or backbone.

    Raises:
        CheckpointError: They are of another model, or a frozen U-Net has other weights than in
            training.
    """
    try:
        module.load_state_dict(dict(state_dict))
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights are of another model: {error}") from error


def saved_config(config: ClassifierConfig, saved: Mapping[str, Any]) -> ClassifierConfig:
    """Return the options, with those that determine the model of a checkpoint replaced by its."""
    settings = saved["settings"]
    names = {field.name for field in fields(config)} & settings.keys() - _MAY_CHANGE
    values = {name: settings[name] for name in names}
    values |= {"lr": [settings["lr"][_selected(saved)]], "select_on": "none", "subset": None}
    return replace(config, **{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def _selected(saved: Mapping[str, Any]) -> int:
    return saved["best"]["index"] if saved["best"] else 0


def _check_out(config: ClassifierConfig) -> None:
    """Keep training runs and evaluations apart."""
    files = _TRAINING_FILES if config.evaluate else (*_TRAINING_FILES, "results.json")
    checked = config.evaluate or not config.resume
    if checked and any((config.out / name).is_file() for name in files):
        way = "" if config.evaluate else "--resume continues it, or "
        raise UserError(f"{config.out} already holds a run: {way}take another --out")


def _open_caches(
    config: ClassifierConfig,
    model: Classifier,
    train: ImageFolder,
    val: ImageFolder,
    accelerator: Accelerator,
) -> tuple[FeatureCache, FeatureCache]:
    def open_one(split: str, images: ImageFolder, copies: int) -> FeatureCache:
        folder = config.cache / split
        if accelerator.is_main_process and not folder.is_dir():
            check_images(images)
        return open_features(
            folder, images, model.backbone, model.spec, accelerator.state, copies=copies,
            workers=config.workers, overwrite=config.overwrite_cache,
        )  # fmt: skip

    mirrored = config.augment == "flip"
    return open_one("train", train, 2 if mirrored else 1), open_one("val", val, 1)


def _settings(config: ClassifierConfig, train: ImageFolder, val: ImageFolder) -> dict[str, Any]:
    settings = settings_of(config)
    for split, images in (("train", train), ("val", val)):
        names = json.dumps([images.listing.paths, images.listing.labels])
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
