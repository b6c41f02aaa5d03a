"""The classifier: recipes, training, selection, checkpoints, resuming, several processes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("torchmetrics")
pytest.importorskip("tyro")

import forked
import image_folders
from image_folders import CLASSES, write_folder
from published import published_names

from diffbackbone.checkpoint import CheckpointError
from diffbackbone.eval import classify
from diffbackbone.eval.features import FeatureCache, FeatureSpec
from diffbackbone.eval.recipes import RECIPES, resolve
from diffbackbone.utils import UserError

weights = image_folders.weights
one_thread = image_folders.one_thread
pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN, VAL = 6, 3
SMALL = {
    "unet": "tiny", "image_size": 32, "blocks": (12,), "workers": 0, "device": "cpu", "epochs": 2,
    "batch_size": 10, "width": 32, "num_heads": 2, "layers": 1, "log_with": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", TRAIN, 0)
    write_folder(root / "val", VAL, 1, ".jpg")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Shared features, with mirrored copies, of linear heads on random weights."""
    return tmp_path_factory.mktemp("cache")


def train(data, out, recipe="probe", **options):
    given = {"data": data, "out": out, **SMALL, **options}
    return classify.run(replace(RECIPES[recipe], **given))


def words(**options):
    """The options as a command line."""
    found = []
    for name, value in {**SMALL, **options}.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def history(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records


def numbers(out):
    """Everything a run reports, except times and paths."""
    results = json.loads((out / "results.json").read_text())
    keys = ("lr", "epoch", "val", "confusion", "trained_parameters")
    return history(out), {key: results[key] for key in keys}


def test_recipe_gives_the_defaults_of_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(classify, "run", seen.append)
    classify.main(["--recipe", "semi-10", "--no-finetune", "--epochs", "5", "--lr", "1", "2"])
    expected = replace(RECIPES["semi-10"], finetune=False, epochs=5, lr=(1.0, 2.0))
    assert seen == [expected]
    words = "--feedback 24:14,21:17 --feedback-layers conv group --first-blocks 19 24"
    classify.main([*words.split(), "--published=--t_list 150 --feedback_b_list 21"])
    found = seen[1]
    assert (found.feedback, found.feedback_layers) == ("24:14,21:17", ("conv", "group"))
    assert found.first_blocks == (19, 24)
    assert found.published == "--t_list 150 --feedback_b_list 21"  # underscores stay
    with pytest.raises(SystemExit):
        classify.main(["--recipe", "none"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (19, 24)}, "one block and timestep"),
        ({"blocks": (38,)}, "from 1 to 37"),
        ({"head": "attention", "width": 33}, "33"),
        ({"lr": (0.1, 0.2), "finetune": True, "select_on": "val"}, "need --select-on heldout"),
        ({"first_blocks": (19,), "head": "difformer"}, "--first-blocks needs"),
        ({"published": "--t_list 150"}, "--published is for"),
        ({"lr": (0.1, 0.2), "select_on": "none"}, "need --select-on"),
        ({"cache": Path("c"), "feedback": "windowed", "blocks": (24,)}, "without feedback"),
        ({"cache": Path("c"), "finetune": True}, "frozen"),
        ({"cache": Path("c"), "noise": "random"}, "noise"),
        ({"cache": Path("c"), "augment": "crop-flip"}, "random crops"),
        ({"feedback": "windowed", "blocks": (3,)}, "block"),
        ({"feedback": "24:19", "blocks": (24,)}, "24 -> 19"),
    ],
)
def test_options_that_exclude_each_other(data, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"head": "linear", "log_with": "tensorboard", "epochs": 2},
        {"head": "mlp", "hidden": (16,), "pool": 1},
        {"head": "cnn", "hidden": (8,), "pool": 4},
        {"finetune": True, "noise": "random", "backbone_lr": 1e-5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_head_trains(data, tmp_path, options):
    results = train(data, tmp_path, **{"epochs": 1, **options})
    files = {path.name for path in tmp_path.iterdir()}
    assert {"last.pt", "best.pt", "metrics.jsonl", "results.json", "confusion.png"} <= files
    saved = json.loads((tmp_path / "results.json").read_text())
    assert results["val"]["images"] == np.sum(saved["confusion"]) == CLASSES * VAL
    right = np.trace(saved["confusion"]) / (CLASSES * VAL)
    assert right == pytest.approx(saved["val"]["top1"])
    assert saved["val"]["top5"] == 1.0  # of three classes
    assert history(tmp_path)[-1]["val"][0] == saved["val"]
    if "log_with" in options:
        board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = board.EventAccumulator(str(tmp_path / "diffbackbone")).Reload()
        assert [event.step for event in events.Scalars("val_top1/0.001")] == [1, 2]


def test_a_probe_learns(data, tmp_path, cache):
    results = train(data, tmp_path, lr=(0.1,), epochs=12, cache=cache)
    assert results["val"]["top1"] > 0.9
    losses = [record["train"][0]["loss"] for record in history(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]


def test_cache_changes_no_digit(data, tmp_path, weights):
    options = {"head": "attention", "checkpoint": weights, "augment": "flip"}
    train(data, tmp_path / "plain", **options)
    train(data, tmp_path / "cached", cache=tmp_path / "cache", **options)
    assert FeatureCache(tmp_path / "cache/train").settings["copies"] == 2
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "cached")


def test_several_rates_are_several_runs(data, tmp_path, cache):
    rates = (0.01, 0.3)
    train(data, tmp_path / "both", lr=rates, select_on="val", cache=cache)
    both = history(tmp_path / "both")
    for index, lr in enumerate(rates):
        train(data, tmp_path / str(lr), lr=(lr,), select_on="val", cache=cache)
        for record, alone in zip(both, history(tmp_path / str(lr))):
            loss = pytest.approx(alone["train"][0]["loss"], rel=1e-5)
            assert record["train"][index]["loss"] == loss
            assert record["val"][index]["top1"] == alone["val"][0]["top1"]


def test_held_out_training_images_select_what_is_trained_on_all(data, tmp_path, cache):
    options, rates = {"holdout": 0.33, "cache": cache}, (1e-4, 0.01, 0.1)
    results = train(data, tmp_path / "out", lr=rates, epochs=4, **options)
    records = history(tmp_path / "out/search")
    assert results["selected_on"] == "heldout"
    assert records[0]["heldout"][0]["images"] == CLASSES * TRAIN // 3
    *_, epoch, index = max(
        (found["top1"], -found["loss"], -record["epoch"], -index)
        for record in records
        for index, found in enumerate(record["heldout"])
    )
    assert (results["epoch"], results["lr"]) == (-epoch, rates[-index])
    assert results["heldout"] == records[results["epoch"] - 1]["heldout"][-index]
    assert classify.read_checkpoint(tmp_path / "out/best.pt")["best"]["lr"] == results["lr"]
    assert history(tmp_path / "out")[0]["train"][0]["images"] == CLASSES * TRAIN
    train(data, tmp_path / "alone", lr=(results["lr"],), epochs=results["epoch"], **options)
    assert numbers(tmp_path / "out") == numbers(tmp_path / "alone")


def test_held_out_images_choose_between_runs(data, tmp_path, monkeypatch):
    keys, calls = {0.1: [0.5, -1.0], 0.2: [0.5, -0.5], 0.3: [0.4, -0.1]}, []

    def fake(config, *_):
        calls.append((config.lr, config.epochs, config.select_on))
        result = {"lr": config.lr[0], "epoch": 2, "key": keys[config.lr[0]], "heldout": {}}
        return {**result, "selected_on": "heldout", "val": {"top1": config.lr[0]}}

    monkeypatch.setattr(classify, "_run", fake)
    train(data, tmp_path, lr=tuple(keys), finetune=True, epochs=3)
    assert calls == [*(((lr,), 3, "heldout") for lr in keys), ((0.2,), 2, "none")]


def test_rates_that_share_no_backbone_are_tried_one_after_the_other(data, tmp_path, weights):
    options = {"checkpoint": weights, "blocks": (24,), "optimizer": "sgd", "epochs": 1}
    options |= {"feedback": "24:14", "lr": (1e30, 1e-3)}
    found = train(data, tmp_path, **options)
    assert found["lr"] == 1e-3  # a rate that diverges is passed over
    (searched,) = history(tmp_path / "search/lr-0.001")
    assert searched["train"][0]["images"] < CLASSES * TRAIN
    assert history(tmp_path)[0]["train"][0]["images"] == CLASSES * TRAIN
    assert train(data, tmp_path, resume=True, **options)["val"] == found["val"]


def test_epoch_takes_every_image_once_and_half_of_them_mirrored(data, tmp_path, cache, monkeypatch):
    read = []
    original = FeatureCache.read

    def spy(self, row, tap):
        read.append((self.folder.name, row))
        return original(self, row, tap)

    monkeypatch.setattr(FeatureCache, "read", spy)
    options = {"lr": (0.01, 0.1), "select_on": "heldout", "holdout": 0.33, "epochs": 8}
    searched = []
    run = classify._run
    monkeypatch.setattr(classify, "_run", lambda *args: searched.append(len(read)) or run(*args))
    train(data, tmp_path, cache=cache, **options)
    read = read[: searched[1]]  # without the training on all images
    count, held = CLASSES * TRAIN, CLASSES * TRAIN // 3
    rows = [row for name, row in read if name == "train"]
    assert len(rows) == 8 * count
    epochs = [rows[i : i + count] for i in range(0, len(rows), count)]
    for epoch in epochs:
        learned, held_out = epoch[:-held], epoch[-held:]
        assert held_out == epochs[0][-held:]
        assert {row % count for row in learned} | set(held_out) == set(range(count))
    assert len({tuple(row % count for row in epoch) for epoch in epochs}) == 8
    mirrored = np.mean([row >= count for epoch in epochs for row in epoch[:-held]])
    assert 0.3 < mirrored < 0.7
    seen = [row for name, row in read if name == "val"]
    assert seen == list(range(CLASSES * VAL)) * 8


def test_learning_rate_drops_every_step(data, tmp_path, cache):
    rates = []
    for epochs in (2, 3, 5):
        options = {"lr": (0.08,), "step": 2, "gamma": 0.5, "cache": cache}
        train(data, tmp_path, epochs=epochs, resume=True, **options)
        saved = classify.read_checkpoint(tmp_path / "last.pt")
        rates += [group["lr"] for group in saved["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.08, 0.04, 0.02])


def test_resumed_run_keeps_its_own_frozen_weights(data, tmp_path, weights):
    whole = train(data, tmp_path / "whole")
    train(data, tmp_path / "parts", epochs=1)
    other = {"checkpoint": weights, "cache": tmp_path / "cache"}
    assert train(data, tmp_path / "parts", resume=True, **other)["val"] == whole["val"]
    found = train(data, tmp_path / "x", evaluate=tmp_path / "parts/best.pt", **other)
    assert found["val"] == whole["val"]


def test_one_diverging_rate_leaves_the_others_alone(data, tmp_path, cache):
    options = {"head": "mlp", "hidden": (8,), "pool": 2, "optimizer": "sgd", "cache": cache}
    results = train(data, tmp_path / "both", lr=(0.1, 1e25), **options)
    assert results["lr"] == 0.1
    train(data, tmp_path / "alone", lr=(0.1,), select_on="heldout", **options)
    both, alone = history(tmp_path / "both"), history(tmp_path / "alone")
    assert both[-1]["train"][0] == pytest.approx(alone[-1]["train"][0])
    assert "NaN" not in (tmp_path / "both/metrics.jsonl").read_text()
    with pytest.raises(UserError, match="diverged in epoch"):
        train(data, tmp_path / "bad", lr=(1e25,), epochs=4, **options)


def test_frozen_weights_stay_and_fine_tuned_ones_move(data, tmp_path, weights):
    original = torch.load(weights, weights_only=True)
    options = {"checkpoint": weights, "epochs": 1, "lr": (0.01,), "subset": "50%"}
    results = train(data, tmp_path / "frozen", feedback="windowed", blocks=(24,), **options)
    assert results["settings"]["train_images"] == CLASSES * TRAIN // 2
    train(data, tmp_path / "tuned", finetune=True, **options)
    frozen = classify.read_checkpoint(tmp_path / "frozen/best.pt")["backbone"]
    assert not [key for key in frozen if key.startswith("unet.")]
    assert [key for key in frozen if key.startswith("feedback.")]
    tuned = classify.read_checkpoint(tmp_path / "tuned/best.pt")["backbone"]
    moved = [key for key, x in tuned.items() if not torch.equal(x, original[key[len("unet.") :]])]
    assert "unet.input_blocks.0.0.weight" in moved


def test_saved_head_is_evaluated_alone(data, tmp_path, weights):
    options = {"feedback": "windowed", "blocks": (24,), "checkpoint": weights, "lr": (0.01,)}
    trained = train(data, tmp_path / "out", epochs=1, **options)
    best = tmp_path / "out/best.pt"
    options = {"evaluate": best, "checkpoint": weights, "width": 999, "timesteps": (3,)}
    for out in (tmp_path / "eval", None):
        assert train(data, out, **options)["val"] == trained["val"]
    assert (tmp_path / "out/evaluation/best/confusion.png").is_file()
    with pytest.raises(CheckpointError, match="frozen U-Net"):
        train(data, tmp_path / "x", evaluate=best)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"path": Path("x")}, tmp_path / "code.pt")
    for name in ("junk.pt", "code.pt"):
        with pytest.raises(CheckpointError):
            train(data, None, evaluate=tmp_path / name)


def test_evaluation_leaves_the_run_alone(data, tmp_path, cache):
    train(data, tmp_path, cache=cache)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    train(data, None, evaluate=tmp_path / "best.pt")
    own = json.loads((tmp_path / "evaluation/best/results.json").read_text())
    assert own["val"] == json.loads(before["results.json"])["val"]
    for options in (
        {"out": tmp_path, "evaluate": tmp_path / "best.pt"},
        {"out": tmp_path},
        {"out": tmp_path / "evaluation/best"},
    ):
        with pytest.raises(UserError, match="already holds a run"):
            train(data, **options)
    with pytest.raises(UserError, match=r"(?s)head: 'linear', now 'attention'.*lr: \[0.001\]"):
        train(data, tmp_path, resume=True, lr=(0.5,), head="attention")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_head_of_the_published_code_is_evaluated(data, tmp_path, cache):
    trained = train(data, tmp_path / "out", lr=(0.1,), cache=cache)
    head = classify.read_checkpoint(tmp_path / "out/best.pt")["head"]
    published = {key.replace("linear.", "fcs.0."): value for key, value in head.items()}
    torch.save({"model_head": published, "epoch": 1}, tmp_path / "latest.pth")
    assert train(data, None, evaluate=tmp_path / "latest.pth")["val"] == trained["val"]


def test_difffeed_of_the_published_code_is_evaluated(data, tmp_path, weights):
    """With the authors' options, their file needs none of ours but the U-Net's."""
    options = {
        "feedback": "24:14,21:17", "feedback_layers": ("conv", "group", "silu", "depthwise"),
        "timesteps": (150,), "head": "difformer", "blocks": (24, 30), "first_blocks": (19, 24),
        "norm": "batch", "readout": "mean", "mlp_ratio": 2.0, "pool": 4, "checkpoint": weights,
        "lr": (0.01,), "epochs": 1,
    }  # fmt: skip
    trained = train(data, tmp_path / "out", **options)
    saved = classify.read_checkpoint(tmp_path / "out/best.pt")
    config = resolve(classify.saved_config(replace(RECIPES["probe"], data=data, **SMALL), saved))
    spec = FeatureSpec.of(config, config.pool, config.start())
    model = classify.build_model(config, CLASSES, spec)
    model.heads[0].load_state_dict(saved["head"])
    order = ["21", "24"]  # --feedback_b_list
    feedback = {}
    for key, value in saved["backbone"].items():
        if key.startswith("feedback."):
            _, b, *name = key.split(".")
            feedback[".".join([str(order.index(b)), *name])] = value
    latest = {"model_head": published_names(model.heads[0]), "model_feedback": feedback}
    torch.save({**latest, "epoch": 1, "optimizer": {}}, tmp_path / "latest.pth")
    flags = {"checkpoint": weights, "blocks": (), "width": 8, "published": (
        "--t_list 150 --first_fw_b_list 19 24 --second_fw_b_list 24 30 --pre_pool_size 4 "
        "--feedback_b_list 21 24 --feedback_arch C_G_S_C --norm_type batch --lr 1e-2 "
        "--fusion_arc Use_CLS_Token:True:32,Attention:32:2:2:1,FullyPool"
    )}  # fmt: skip
    for out, given in (("own", options), ("flags", flags)):
        found = train(data, tmp_path / out, evaluate=tmp_path / "latest.pth", **given)
        assert found["val"] == trained["val"]
    for wrong in ({"feedback": "none", "first_blocks": ()}, {"norm": "layer"}):
        with pytest.raises(UserError, match=r"trained with --feedback|doesn't fit"):
            train(data, None, evaluate=tmp_path / "latest.pth", **options | wrong)
    torch.save({**latest, "model_fpn": {}}, tmp_path / "latest.pth")
    with pytest.raises(UserError, match="model_fpn"):
        train(data, None, evaluate=tmp_path / "latest.pth", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"feedback": "windowed", "blocks": (24,), "noise": "random", "augment": "crop-flip"},
        {"lr": (0.01, 0.1), "optimizer": "sgd", "momentum": 0.9, "select_on": "val"},
        {"finetune": True, "backbone_lr": 1e-4},
    ],
    ids=["difffeed", "rates", "finetune"],
)
def test_resumed_run_equals_an_unbroken_one(data, tmp_path, weights, options):
    options["checkpoint"] = weights
    train(data, tmp_path / "whole", **options)
    train(data, tmp_path / "parts", epochs=1, **options)
    train(data, tmp_path / "parts", resume=True, **options)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_sigkill_costs_an_epoch_at_most(data, tmp_path, weights):
    out = tmp_path / "killed"
    options = {"head": "attention", "epochs": 3, "step": 2, "lr": (0.003,), "checkpoint": weights}
    train(data, tmp_path / "whole", **options)
    command = ["tools/train_classifier.py", *words(data=data, out=out, resume=True, **options)]
    script = forked.Script(command, tmp_path / "log", {})
    saved, deadline = out / "last.pt", time.monotonic() + 120
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    script.kill()
    assert 1 <= len(classify.read_checkpoint(saved)["history"]) < 3
    train(data, out, resume=True, **options)
    assert numbers(out) == numbers(tmp_path / "whole")


def test_accumulation_and_two_processes_equal_one(data, tmp_path, weights):
    options = {"head": "attention", "checkpoint": weights, "optimizer": "sgd", "lr": (0.05,)}
    options["batch_size"] = 7
    train(data, tmp_path / "one", **options)
    train(data, tmp_path / "parts", accumulate=3, **options)
    given = words(data=data, out=tmp_path / "two", cache=tmp_path / "cache", **options)
    scripts = [
        forked.Script(["tools/train_classifier.py", *given], tmp_path / rank["RANK"], rank)
        for rank in forked.ranks(2)
    ]
    for script in scripts:
        script.finish(120)
    one = numbers(tmp_path / "one")
    assert np.sum(one[1]["confusion"]) == CLASSES * VAL  # odd; every image counts once
    for other in (numbers(tmp_path / "parts"), numbers(tmp_path / "two")):
        assert other[1]["confusion"] == one[1]["confusion"]
        for before, after in zip(one[0], other[0]):
            assert after["train"][0] == pytest.approx(before["train"][0], rel=1e-3)
            assert after["val"][0] == pytest.approx(before["val"][0], rel=1e-3)
