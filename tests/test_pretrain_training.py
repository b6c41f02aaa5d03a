"""The data and the training run of diffbackbone.pretrain."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from diffbackbone import DiffusionBackbone, NoiseSchedule, UNet, UNetConfig, load_checkpoint
from diffbackbone.checkpoint import read_unet_config
from diffbackbone.pretrain import training
from diffbackbone.pretrain.data import Examples, draw_noise, find_images
from diffbackbone.pretrain.sampling import sample_ddim, save_grid
from diffbackbone.utils import RandomStream, UserError

COUNT = 7
FIELDS = {
    "model_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "attention_strides": [2],
    "num_head_channels": 16, "image_size": 16, "dropout": 0.1,
}  # fmt: skip
SMALL = {
    "unet": json.dumps(FIELDS), "workers": 0, "device": "cpu", "batch_size": 4, "iterations": 6,
    "warmup": 2, "samples": 2, "sample_steps": 2, "log_every": 2, "save_every": 3,
}  # fmt: skip
SHORT = {"unet": json.dumps({**FIELDS, "dropout": 0.0}), "iterations": 2, "learn_variance": True}
EXACT = {"rtol": 0, "atol": 0}


def write_images(root: Path, count: int = COUNT) -> Path:
    random = np.random.default_rng(0)
    for i in range(count):
        folder = root if i % 2 else root / "deep" / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 60, (20 + i, 24, 3))
        pixels[4:12, 4:12, i % 3] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.{'jpg' if i % 3 else 'png'}")
    return root


def train(data, out, **options):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return training.run(training.PretrainConfig(data=data, out=out, **{**SMALL, **options}))


def start(log, data, out, ranks=(), **options) -> list[forked.Script]:
    """Start the command, or a process of it for each rank."""
    words = ["tools/pretrain.py"]
    for name, value in {"data": data, "out": out, **SMALL, **options}.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [forked.Script(words, log / f"{i}.log", env) for i, env in enumerate(ranks or [{}])]


def read(out: Path, name: str = "last.pt") -> dict:
    return torch.load(out / name, weights_only=True)


def state(out: Path) -> dict:
    """What two equal runs have in common."""
    last = read(out)
    for record in last["history"]:
        del record["images_per_second"]
    names = ("unet", "average", "iteration", "sums", "history")
    return {**{name: last[name] for name in names}, "optimizer": last["optimizer"]["state"]}


def assert_same_steps(first: Path, second: Path) -> None:
    """Equal but for rounding; Adam's steps alone don't tell the scale of a gradient."""
    assert change(read(first, "unet.pt"), read(second, "unet.pt")) < 1e-5
    torch.testing.assert_close(state(first)["history"], state(second)["history"])


def change(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def shown(out: Path) -> np.ndarray:
    """The last samples."""
    with Image.open(max((out / "samples").iterdir())) as picture:
        return np.asarray(picture, dtype=int)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A run without an interruption."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    train(data, out)
    return out


@pytest.fixture(scope="module")
def short(data, tmp_path_factory):
    """A run of two iterations without dropout."""
    out = tmp_path_factory.mktemp("runs") / "short"
    train(data, out, **SHORT, samples=3)
    return out


# ------------------------------------------------------------------------------------------- data


def examples(root, **options):
    return Examples(find_images(root), **{"size": 16, "flip": False, **options})


def test_epoch_has_each_image_once_in_another_order(data):
    one = examples(data)
    assert {data / "deep/deeper/0.png", data / "1.jpg"} <= set(one.paths)
    epochs = [[one.index(n) for n in range(e * COUNT, (e + 1) * COUNT)] for e in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [examples(data, seed=1).index(n) for n in range(COUNT)] != epochs[0]
    assert [examples(data).index(n) for n in (20, 3, 9)] == [one.index(n) for n in (20, 3, 9)]


def gradient(root: Path, width: int, height: int) -> Path:
    """A folder with an image whose red tells the column and whose green tells the row."""
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)).save(root / "one.png")
    return root


def pixels(crop: torch.Tensor) -> torch.Tensor:
    return (crop + 1) * 127.5


def test_crops_lie_anywhere_and_half_of_them_are_mirrored(tmp_path):
    root = gradient(tmp_path, 100, 40)
    crops = torch.stack([pixels(examples(root).crop(number)) for number in range(150)])
    lefts, tops = crops[:, 0, :1, :1], crops[:, 1, :1, :1]
    torch.testing.assert_close(crops[:, 0], (lefts + torch.arange(16)).expand(-1, 16, 16))
    torch.testing.assert_close(crops[:, 1], (tops + torch.arange(16)[:, None]).expand(-1, 16, 16))
    assert {int(tops.min().round()), int(tops.max().round())} == {0, 24}
    assert lefts.min() < 5
    assert lefts.max() > 79
    flipped = torch.stack([pixels(examples(root, flip=True).crop(n)) for n in range(150)])
    mirrored = flipped[:, 0, 0, 0] > flipped[:, 0, 0, 1]
    assert torch.equal(flipped, torch.where(mirrored[:, None, None, None], crops.flip(-1), crops))
    assert 50 < mirrored.sum() < 100


def test_small_images_grow_and_large_ones_shrink_if_asked(tmp_path):
    small = pixels(examples(gradient(tmp_path, 12, 8)).crop(0))
    assert small.shape == (3, 16, 16)
    assert small[1].max() >= 6  # all 8 rows are in it
    root = gradient(tmp_path, 200, 100)
    assert pixels(examples(root).crop(0))[0].diff(dim=-1).max() < 1.1
    assert pixels(examples(root, shrink=1.25).crop(0))[0].diff(dim=-1).max() >= 4  # 5 in 1


def test_draws_depend_on_seed_and_number_alone(data):
    many = [examples(data)[number] for number in range(100)]
    torch.testing.assert_close(examples(data)[77], many[77], **EXACT)
    assert not torch.equal(examples(data, seed=1)[77]["noise"], many[77]["noise"])
    t = [example["t"] for example in many]
    assert 0 <= min(t) < 100
    assert 900 < max(t) < 1000
    assert len(set(t)) > 80
    noise = torch.stack([example["noise"] for example in many])
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "options",
    [
        {"unet": "huge"}, {"unet": '{"wings": 2}'}, {"unet": '{"in_channels": 5}'},
        {"unet": "tiny", "size": 48}, {"accumulate": 3}, {"iterations": 0}, {"shrink": 0.5},
        {"ema_decay": 1.1}, {"sample_steps": 1001}, {"resume": True}, {"data": Path("nowhere")},
    ],
)  # fmt: skip
def test_impossible_options_are_refused_before_anything_is_written(data, tmp_path, options):
    with pytest.raises((UserError, FileNotFoundError)):
        train(**{"data": data, "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_options_reach_the_data_and_the_optimizer(data, tmp_path):
    given = {"flip": False, "shrink": 1.5, "value_range": (0.0, 1023.0), "seed": 3}
    options = {**SMALL, **given, "size": 32, "weight_decay": 0.1, "activation_checkpointing": True}
    run = training.Pretraining(training.PretrainConfig(data, tmp_path / "out", **options))
    examples = run.loader.dataset
    assert {name: getattr(examples, name) for name in given} == given
    assert examples.size == run.unet_config.image_size == 32
    assert run.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert run.accelerator.unwrap_model(run.model).activation_checkpointing


def test_broken_image_is_named_before_training(tmp_path):
    bad = write_images(tmp_path / "own") / "deep" / "deeper" / "0.png"
    bad.write_bytes(bad.read_bytes()[:500])
    with pytest.raises(UserError, match=r"0\.png"):
        train(tmp_path / "own", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_learns_and_is_tracked(data, tmp_path):
    options = {"lr": 4e-3, "samples": 0, "save_every": 40, "log_with": "tensorboard"}
    last = train(data, tmp_path, iterations=40, **options)
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [record["iteration"] for record in history] == list(range(2, 41, 2))
    assert history[0]["loss"] > 0.9
    assert np.mean([record["loss"] for record in history[-5:]]) < 0.5
    assert history[-1] == last
    assert not (tmp_path / "samples").exists()
    assert list((tmp_path / "logs").rglob("*tfevents*"))


def test_files_of_a_run(data, unbroken):
    assert {path.name for path in unbroken.iterdir()} == {
        "last.pt", "unet.pt", "unet.safetensors", "unet.json", "metrics.jsonl", "loss.png",
        "samples",
    }  # fmt: skip
    last, weights = read(unbroken), read(unbroken, "unet.pt")
    assert type(weights) is dict
    assert list(weights) == list(UNet(UNetConfig(**FIELDS).replace(out_channels=3)).state_dict())
    torch.testing.assert_close(weights, dict(last["average"]), **EXACT)
    assert change(weights, last["unet"]) > 0
    assert shown(unbroken).shape == (16 + 4, 2 * 16 + 6, 3)
    with Image.open(unbroken / "loss.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 3
    description = json.loads((unbroken / "unet.json").read_text())
    assert description["guided_diffusion"]["learn_sigma"] is False
    backbone = DiffusionBackbone(
        description["unet"], unbroken / "unet.pt", blocks=5, out_channels=None, out_strides=None
    )
    assert backbone(torch.zeros(1, 3, 32, 32))[0].shape == (1, 32, 16, 16)


def test_learned_variance_has_six_channels_and_a_bound(short):
    last = read(short)["history"][-1]
    assert last["vlb"] > 0
    assert last["loss"] == pytest.approx(last["simple"] + 0.001 * last["vlb"], rel=1e-5)
    unet = UNet(read_unet_config(short / "unet.safetensors"))
    assert unet.config == UNetConfig(**{**FIELDS, "dropout": 0.0})
    load_checkpoint(unet, short / "unet.safetensors")
    torch.testing.assert_close(dict(unet.state_dict()), read(short, "unet.pt"), **EXACT)
    assert json.loads((short / "unet.json").read_text())["guided_diffusion"]["learn_sigma"]


def test_samples_are_of_the_averaged_weights(data, tmp_path):
    train(data, tmp_path, lr=0.02, iterations=5, sample_steps=4, sample_every=2)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["0000002.png", "0000004.png", "0000005.png"]
    picture, noise = shown(tmp_path), [draw_noise(RandomStream.SAMPLES, 0, i, 16) for i in range(2)]
    unet = UNet(UNetConfig(**FIELDS).replace(out_channels=3)).eval()
    differences = []
    for name in ("average", "unet"):
        unet.load_state_dict(read(tmp_path)[name])
        made = sample_ddim(unet, NoiseSchedule("linear"), torch.stack(noise), 4)
        save_grid(made, tmp_path / name / "samples" / "0.png")
        differences.append(np.abs(picture - shown(tmp_path / name)).max())
    assert differences[0] <= 1
    assert differences[1] > 5


def test_rate_and_clipping_reach_the_optimizer(data, tmp_path):
    options = {"warmup": 4, "lr_decay": 2, "log_every": 1}
    train(data, tmp_path / "clipped", lr=1e-2, clip=1e-12, **options)  # far below Adam's epsilon
    rates = [record["lr"] for record in read(tmp_path / "clipped")["history"]]
    assert rates == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 5e-3])
    train(data, tmp_path / "start", lr=1e-12, **options)
    clipped, start = (read(tmp_path / name, "unet.pt") for name in ("clipped", "start"))
    assert change(clipped, start) < 1e-5


def test_two_processes_with_parts_make_the_same_steps(data, tmp_path, short):
    train(data, tmp_path / "parts", **SHORT, accumulate=2)
    assert_same_steps(short, tmp_path / "parts")
    options = {**SHORT, "samples": 3, "accumulate": 2}
    scripts = start(tmp_path, data, tmp_path / "two", forked.ranks(2), **options)
    printed = [script.finish(120) for script in scripts]
    assert [text.count("iteration 2 ") for text in printed] == [1, 0]
    assert_same_steps(short, tmp_path / "two")
    np.testing.assert_allclose(shown(short), shown(tmp_path / "two"), atol=1)


@pytest.mark.parametrize(("channels", "suffix"), [(5, ".npy"), (1, ".tif")])
def test_images_of_other_channels(tmp_path, channels, suffix):
    random = np.random.default_rng(0)
    images = random.integers(0, 65536, (4, 20, 24, channels), dtype=np.uint16)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        path = tmp_path / "images" / f"{i}{suffix}"
        np.save(path, image) if suffix == ".npy" else Image.fromarray(image[..., 0]).save(path)
    found = examples(tmp_path / "images", size=20, channels=channels)
    image = images[found.index(0)].transpose(2, 0, 1) / 32767.5 - 1
    errors = [np.abs(found.crop(0).numpy() - image[..., x : x + 20]).max() for x in range(5)]
    assert min(errors) < 1e-6
    unet = json.dumps({**FIELDS, "in_channels": channels})
    train(tmp_path / "images", tmp_path / "out", unet=unet, iterations=2, learn_variance=True)
    assert shown(tmp_path / "out").shape == (16 + 4, 2 * 16 + 6, 3)
    config = read_unet_config(tmp_path / "out" / "unet.safetensors")
    assert (config.in_channels, config.out_channels) == (channels, 2 * channels)
    load_checkpoint(UNet(config), tmp_path / "out" / "unet.pt")


def test_bfloat16_and_compiled_steps(data, tmp_path, monkeypatch, short):
    train(data, tmp_path / "half", **SHORT, precision="bfloat16")
    half = read(tmp_path / "half", "unet.pt")
    assert 0 < change(read(short, "unet.pt"), half) < 1e-3
    assert {x.dtype for x in half.values()} == {torch.float32}
    compiler, compiled = torch.compile, []

    def compile_quickly(model, **_):
        compiled.append(model)
        return compiler(model, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    train(data, tmp_path / "compiled", **SHORT, compile=True)
    torch.compiler.reset()
    assert len(compiled) == 1
    assert_same_steps(short, tmp_path / "compiled")


def test_weights_to_start_from(data, tmp_path, unbroken):
    weights = str(unbroken / "unet.pt")
    train(data, tmp_path / "out", checkpoint=weights, iterations=1, lr=1e-12)
    assert change(read(tmp_path / "out", "unet.pt"), read(unbroken, "unet.pt")) < 1e-6
    with pytest.raises(UserError, match="out_channels"):
        train(data, tmp_path / "other", checkpoint=weights, learn_variance=True)


# ---------------------------------------------------------------------------- resuming, disasters


def test_resumed_run_equals_an_unbroken_one(data, tmp_path, unbroken):
    options = {"workers": 1, "save_every": 2}
    train(data, tmp_path, iterations=4, **options)
    train(data, tmp_path, resume=True, **options)
    torch.testing.assert_close(state(tmp_path), state(unbroken), **EXACT)
    before = (tmp_path / "last.pt").read_bytes()
    train(data, tmp_path, resume=True)  # nothing is left to do
    assert (tmp_path / "last.pt").read_bytes() == before


def test_killed_command_can_be_resumed(data, tmp_path):
    out = tmp_path / "out"
    (script,) = start(tmp_path, data, out, save_every=1, iterations=1000)
    deadline = time.monotonic() + 120
    while not (out / "unet.pt").exists() and time.monotonic() < deadline:
        assert script.returncode is None, "it ended before it could be killed"
        time.sleep(0.001)
    script.kill()
    iterations = read(out)["iteration"] + 1
    train(data, out, iterations=iterations, resume=True, save_every=1)
    train(data, tmp_path / "whole", iterations=iterations)
    torch.testing.assert_close(read(out)["unet"], read(tmp_path / "whole")["unet"], **EXACT)


def test_sigterm_is_saved(data, tmp_path, monkeypatch, unbroken):
    step = training.Pretraining.step

    def interrupted(self, batches):
        if self.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(training.Pretraining, "step", interrupted)
    train(data, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert read(tmp_path)["iteration"] == 3
    assert not (tmp_path / "samples").exists()
    monkeypatch.undo()
    train(data, tmp_path, resume=True)
    torch.testing.assert_close(state(tmp_path), state(unbroken), **EXACT)


def test_what_is_not_finite_ends_the_run_and_overwrites_nothing(data, tmp_path, monkeypatch):
    call, calls = training.DiffusionObjective.__call__, []

    def broken(self, output, **rest):
        losses = call(self, output, **rest)
        calls.append(1)
        if len(calls) == 5:  # the root has no derivative at zero
            losses["loss"] = losses["loss"] + (0 * output.flatten(1).sum(1)).abs().sqrt()
        return losses

    monkeypatch.setattr(training.DiffusionObjective, "__call__", broken)
    with pytest.raises(UserError, match="grad_norm is nan in iteration 5"):
        train(data, tmp_path, save_every=4)
    assert read(tmp_path)["iteration"] == 4
    assert all(torch.isfinite(x).all() for x in read(tmp_path, "unet.pt").values())


def test_runs_are_neither_overwritten_nor_mixed(data, tmp_path, unbroken):
    before = (unbroken / "last.pt").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        train(data, unbroken)
    with pytest.raises(UserError, match=r"(?s)flip: True, now False.*lr: 0.0001, now 0.5"):
        train(data, unbroken, resume=True, lr=0.5, flip=False)
    with pytest.raises(UserError, match="images: '7 images, "):
        train(write_images(tmp_path / "other", COUNT - 1), unbroken, resume=True)
    assert (unbroken / "last.pt").read_bytes() == before
    torch.save({"weights": torch.zeros(1)}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt"):
        train(data, tmp_path, resume=True)
