"""`tools/pretrain.py`."""

# ruff: noqa: E402 - the tools are found by their folder

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path.append(str(TOOLS))

import pretrain
from _classification import ToolError, list_images

from diffbackbone import DiffusionBackbone, UNet, UNetConfig, load_checkpoint
from diffbackbone.checkpoint import read_unet_config
from diffbackbone.pretrain.objective import sample_ddim

COUNT = 7
FIELDS = {
    "model_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "attention_strides": [2],
    "num_head_channels": 16, "image_size": 16, "dropout": 0.1,
}  # fmt: skip
SMALL = [
    "--unet", json.dumps(FIELDS), "--workers", "0", "--device", "cpu", "--batch-size", "4",
    "--iterations", "6", "--warmup", "2", "--samples", "2", "--sample-steps", "2",
    "--log-every", "2", "--save-every", "3",
]  # fmt: skip


def write_images(root: Path, count: int = COUNT) -> None:
    random = np.random.default_rng(0)
    for i in range(count):
        folder = root if i % 2 else root / "deep" / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 60, (20 + i, 24, 3))
        pixels[4:12, 4:12, i % 3] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.{'jpg' if i % 3 else 'png'}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(data, out, *options) -> list[str]:
    return ["--data", str(data), "--out", str(out), *SMALL, *map(str, options)]


def train(data, out, *options):
    return pretrain.run(pretrain.parse(arguments(data, out, *options)))


def fails(*options) -> str:
    with pytest.raises(SystemExit) as error:
        pretrain.main([*SMALL, *map(str, options)])
    message = str(error.value)
    assert message.startswith("error: ")
    return message


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "unet.pt", weights_only=True)


def saved(out: Path, name: str = "last.pt") -> dict:
    return torch.load(out / name, weights_only=True)


def assert_same(a, b) -> None:
    """Equal to the bit, through all levels."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "images_per_second":
                assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def changes(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def assert_same_losses(first: Path, second: Path) -> None:
    """Equal but for rounding; Adam's steps alone don't tell the scale of a gradient."""
    one, two = (saved(out)["history"][-1] for out in (first, second))
    for name in {*one} - {"images_per_second"}:
        assert one[name] == pytest.approx(two[name], rel=1e-5), name


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A run without an interruption."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    train(data, out)
    return out


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--unet", "huge"], "unknown preset 'huge'; choose from gd64"),
        (["--unet", '{"preset": "tiny"'], "not JSON"),
        (["--unet", '{"preset": "tiny", "wings": 2}'], "wings"),
        (["--unet", '{"preset": "tiny", "in_channels": 1}'], "images are RGB"),
        (["--size", "25"], "--size 25: this U-Net needs a multiple of 2, such as 24 or 26"),
        (["--unet", "tiny", "--size", "48"], "a multiple of 32, such as 32 or 64"),
        (["--batch-size", "4", "--accumulate", "3"], "--batch-size 4 is no multiple of 3"),
        (["--iterations", "0"], "--iterations must be at least 1, got 0"),
        (["--save-every", "0"], "--save-every must be at least 1, got 0"),
        (["--lr", "0"], "--lr must be above 0, got 0.0"),
        (["--lr", "nan"], "--lr must be above 0, got nan"),
        (["--ema-decay", "1"], "--ema-decay must be at least 0 and below 1, got 1.0"),
        (["--clip", "-1"], "--clip must be at least 0, got -1.0"),
        (["--shrink", "0.5"], "--shrink must be at least 1, got 0.5"),
        (["--sample-steps", "1001"], "--sample-steps must lie in 1..1000, got 1001"),
        (["--checkpoint", "nowhere.pt"], "there is no checkpoint 'nowhere.pt'"),
        (["--resume"], "holds no checkpoint"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(data, tmp_path, options, message):
    out = tmp_path / "out"
    assert message in fails("--data", data, "--out", out, *options)
    assert not out.exists()


def test_data_and_out_are_needed(data, tmp_path):
    assert "--data DIR" in fails("--out", tmp_path / "out")
    assert "--out DIR" in fails("--data", data)


@pytest.mark.parametrize("spoil", ["truncated", "text", "empty", "none"])
def test_broken_images_are_named_before_training(tmp_path, spoil):
    root, out = tmp_path / "own", tmp_path / "out"
    write_images(root)
    bad = root / "deep" / "deeper" / "0.png"
    if spoil == "truncated":
        bad.write_bytes(bad.read_bytes()[:500])
    elif spoil == "text":
        bad.write_text("no image")
    elif spoil == "empty":
        bad.write_bytes(b"")
    else:
        for path in [*root.rglob("*.png"), *root.rglob("*.jpg")]:
            path.unlink()
        bad = root
    message = fails("--data", root, "--out", out)
    assert str(bad) in message
    assert not out.exists()


def test_presets_are_listed(capsys):
    pretrain.main(["--list"])
    printed = capsys.readouterr().out
    assert "gd256_uncond     256      37      552.8M  linear" in printed
    assert "tiny" in printed


# ------------------------------------------------------------------------------------------- data


def crops(data, **options):
    settings = {"size": 16, "seed": 0, "flip": False, **options}
    return pretrain.Crops(list_images(data), **settings)


def test_images_are_found_however_deep(data):
    paths = crops(data).folder.listing.paths
    assert len(paths) == COUNT
    assert {"deep/deeper/0.png", "1.jpg"} <= set(paths)


def test_epoch_has_each_image_once_in_another_order(data):
    one = crops(data)
    epochs = [[one.index(n) for n in range(e * COUNT, (e + 1) * COUNT)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [crops(data, seed=1).index(n) for n in range(COUNT)] != epochs[0]
    assert [crops(data).index(n) for n in (20, 3, 9)] == [one.index(n) for n in (20, 3, 9)]


def gradient(root: Path, width: int, height: int) -> Path:
    """An image whose red tells the column and whose green tells the row."""
    root.mkdir()
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(root / "one.png")
    return root


def test_crops_lie_anywhere_and_are_not_scaled(tmp_path):
    one = crops(gradient(tmp_path / "g", 100, 40))
    lefts, tops = set(), set()
    for number in range(150):
        crop = one[number]
        assert crop.dtype == torch.uint8
        left, top = int(crop[0, 0, 0]), int(crop[1, 0, 0])
        assert torch.equal(crop[0], (left + torch.arange(16)).expand(16, 16).byte())
        assert torch.equal(crop[1], (top + torch.arange(16)).expand(16, 16).T.byte())
        lefts.add(left)
        tops.add(top)
    assert {min(tops), max(tops)} == {0, 24}
    assert min(lefts) < 5
    assert max(lefts) > 79
    assert torch.equal(one[5], crops(tmp_path / "g")[5])


def test_half_of_the_crops_are_mirrored_unless_forbidden(tmp_path):
    root = gradient(tmp_path / "g", 40, 40)
    plain, flipped = crops(root), crops(root, flip=True)
    mirrored = 0
    for number in range(80):
        a, b = plain[number], flipped[number]
        if torch.equal(a, b):
            continue
        assert torch.equal(a.flip(-1), b)
        mirrored += 1
    assert 25 < mirrored < 55


def test_small_images_grow_and_large_ones_shrink_if_asked(tmp_path):
    small = crops(gradient(tmp_path / "small", 12, 8))[0]
    assert small.shape == (3, 16, 16)
    assert int(small[1].max()) >= 6  # all 8 rows are in it
    root = gradient(tmp_path / "large", 200, 100)
    assert int(crops(root)[0][0].float().diff(dim=-1).max()) == 1
    assert int(crops(root, shrink=1.25)[0][0].float().diff(dim=-1).max()) >= 4  # 5 in 1


def test_draws_depend_on_seed_and_number_alone():
    t, noise = pretrain.draw(0, range(40, 140), (3, 4, 4), 1000, "cpu")
    t2, noise2 = pretrain.draw(0, [77, 45], (3, 4, 4), 1000, "cpu")
    assert t2.tolist() == [int(t[37]), int(t[5])]
    assert torch.equal(noise2, noise[[37, 5]])
    assert not torch.equal(pretrain.draw(1, [77], (3, 4, 4), 1000, "cpu")[1], noise2[:1])
    assert t.min() < 100
    assert t.max() > 900
    assert len(set(t.tolist())) > 80
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


# ---------------------------------------------------------------------------------------- training


def test_training_learns(data, tmp_path):
    last = train(
        data, tmp_path / "out", "--iterations", 60, "--lr", 2e-3, "--samples", 0, "--save-every", 60
    )
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert [record["iteration"] for record in history] == list(range(2, 61, 2))
    assert history[0]["loss"] > 0.9
    assert np.mean([record["loss"] for record in history[-5:]]) < 0.5
    assert history[-1] == last


def test_files_of_a_run(data, unbroken):
    names = {path.name for path in unbroken.iterdir()}
    assert names == {
        "last.pt", "previous.pt", "unet.pt", "unet.safetensors", "unet.json", "metrics.jsonl",
        "loss.png", "samples",
    }  # fmt: skip
    assert [path.name for path in (unbroken / "samples").iterdir()] == ["0000006.png"]
    assert saved(unbroken, "previous.pt")["iteration"] == 3
    run = saved(unbroken)
    assert run["iteration"] == 6
    state_dict = weights(unbroken)
    assert type(state_dict) is dict
    config = UNetConfig(**FIELDS).replace(out_channels=3)
    assert list(state_dict) == list(UNet(config).state_dict())
    assert {x.dtype for x in state_dict.values()} == {torch.float32}
    assert_same(state_dict, run["ema"])
    assert changes(run["ema"], run["unet"]) > 0
    with Image.open(unbroken / "samples" / "0000006.png") as picture:
        assert picture.size == (2 * 16 + 6, 16 + 4)
    with Image.open(unbroken / "loss.png") as picture:
        assert len(picture.getcolors(1 << 20)) > 3
    description = json.loads((unbroken / "unet.json").read_text())
    assert description["guided_diffusion"]["learn_sigma"] is False
    backbone = DiffusionBackbone(
        description["unet"], unbroken / "unet.pt", blocks=5, out_channels=None, out_strides=None
    )
    assert backbone(torch.zeros(1, 3, 32, 32))[0].shape == (1, 32, 16, 16)


def test_learned_variance_has_six_channels_and_a_bound(data, tmp_path):
    out = tmp_path / "out"
    last = train(data, out, "--learn-variance", "--export-dtype", "float16", "--iterations", 2)
    assert last["vlb"] > 0
    assert last["loss"] == pytest.approx(last["simple"] + 0.001 * last["vlb"], rel=1e-5)
    config = read_unet_config(out / "unet.safetensors")
    assert config == UNetConfig(**FIELDS)
    unet = UNet(config)
    load_checkpoint(unet, out / "unet.safetensors")
    exact = weights(out)
    for key, value in unet.state_dict().items():
        assert torch.equal(value, exact[key].half().float())
    half, full = (os.path.getsize(out / name) for name in ("unet.safetensors", "unet.pt"))
    assert half < 0.55 * full
    flags = json.loads((out / "unet.json").read_text())["guided_diffusion"]
    assert flags["learn_sigma"] is True


def test_samples_are_of_the_averaged_weights(data, tmp_path):
    out = tmp_path / "out"
    train(data, out, "--lr", 0.02, "--iterations", 8, "--sample-steps", 4)
    config = UNetConfig(**FIELDS).replace(out_channels=3)
    seed = pretrain._generator_seed(0, pretrain._SAMPLES, 0)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    differences = []
    for name in ("ema", "unet"):
        unet = UNet(config).eval()
        unet.load_state_dict(saved(out)[name])
        made = sample_ddim(unet, pretrain.NoiseSchedule("linear"), noise, 4)
        with Image.open(out / "samples" / "0000008.png") as picture:
            difference = np.asarray(picture, dtype=int) - np.asarray(pretrain.draw_grid(made))
        differences.append(np.abs(difference).max())
    assert differences[0] <= 1
    assert differences[1] > 5


def test_rate_and_clipping_reach_the_optimizer(data, tmp_path):
    options = ["--lr", 1e-2, "--warmup", 4, "--lr-decay", 2, "--log-every", 1]
    train(data, tmp_path / "out", *options)
    rates = [record["lr"] for record in saved(tmp_path / "out")["history"]]
    assert rates == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 5e-3])
    train(data, tmp_path / "clipped", *options, "--clip", 1e-12)  # far below Adam's epsilon
    train(data, tmp_path / "start", *options, "--lr", 1e-12)
    start = weights(tmp_path / "start")
    assert changes(weights(tmp_path / "out"), start) > 1e-3
    assert changes(weights(tmp_path / "clipped"), start) < 1e-5


def test_pictures_come_as_often_as_asked(data, tmp_path):
    train(data, tmp_path / "out", "--sample-every", 2, "--iterations", 5)
    names = sorted(path.name for path in (tmp_path / "out" / "samples").iterdir())
    assert names == ["0000002.png", "0000004.png", "0000005.png"]


def test_parts_of_a_batch_make_the_same_step(data, tmp_path):
    fields = json.dumps({**FIELDS, "dropout": 0.0})
    for name, parts in (("whole", 1), ("parts", 2)):
        train(data, tmp_path / name, "--unet", fields, "--accumulate", parts, "--iterations", 2)
    assert changes(weights(tmp_path / "whole"), weights(tmp_path / "parts")) < 1e-5
    assert_same_losses(tmp_path / "whole", tmp_path / "parts")


def test_two_processes_make_the_same_steps(data, tmp_path):
    fields = json.dumps({**FIELDS, "dropout": 0.0})
    options = ["--unet", fields, "--iterations", "2", "--learn-variance"]
    train(data, tmp_path / "one", *options)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        str(TOOLS / "pretrain.py"), *arguments(data, tmp_path / "two", *options),
        "--accumulate", "2",
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("iteration 2/2") == 1
    assert changes(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-5
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def test_bfloat16_on_a_cpu(data, tmp_path):
    fields = json.dumps({**FIELDS, "dropout": 0.0})
    for precision in ("float32", "bfloat16"):
        options = ["--unet", fields, "--iterations", 2, "--precision", precision]
        train(data, tmp_path / precision, *options)
    change = changes(weights(tmp_path / "float32"), weights(tmp_path / "bfloat16"))
    assert 0 < change < 1e-3
    assert {x.dtype for x in weights(tmp_path / "bfloat16").values()} == {torch.float32}


def test_compiled_steps_are_the_same(data, tmp_path, monkeypatch):
    compiled = []
    compiler = torch.compile

    def compile_quickly(model):
        compiled.append(model)
        return compiler(model, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    fields = json.dumps({**FIELDS, "dropout": 0.0})
    for name, options in (("plain", []), ("compiled", ["--compile"])):
        train(data, tmp_path / name, "--unet", fields, "--iterations", 2, *options)
    torch.compiler.reset()
    assert len(compiled) == 1
    assert changes(weights(tmp_path / "plain"), weights(tmp_path / "compiled")) < 1e-5


def test_weights_to_start_from(data, tmp_path, unbroken):
    out = tmp_path / "out"
    train(data, out, "--checkpoint", unbroken / "unet.pt", "--iterations", 1, "--lr", 1e-12)
    assert changes(weights(out), weights(unbroken)) < 1e-6
    message = fails(
        "--data", data, "--out", tmp_path / "other", "--checkpoint", unbroken / "unet.pt",
        "--learn-variance",
    )  # fmt: skip
    assert "out_channels: the file has 3, this U-Net 6" in message


# ---------------------------------------------------------------------------- resuming, disasters


@pytest.mark.parametrize("options", [[], ["--workers", "1", "--save-every", "2"]])
def test_resumed_run_equals_an_unbroken_one(data, tmp_path, unbroken, options):
    out = tmp_path / "out"
    train(data, out, "--iterations", 4, *options)
    train(data, out, "--resume", *options)
    first, second = saved(unbroken), saved(out)
    assert first.pop("settings") == second.pop("settings")
    assert_same(first, second)
    assert_same(weights(unbroken), weights(out))


def test_sigkill_costs_a_checkpoint_at_most(data, tmp_path):
    out = tmp_path / "out"
    options = ["--iterations", "24", "--save-every", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / "pretrain.py"), *arguments(data, out, *options)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (out / "previous.pt").exists() and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert 0 < saved(out, "previous.pt")["iteration"] < 24
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on from iteration" in done.stdout
    train(data, tmp_path / "whole", *options)
    assert_same(saved(out)["unet"], saved(tmp_path / "whole")["unet"])
    assert_same(weights(out), weights(tmp_path / "whole"))


def test_sigterm_is_saved(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    step = pretrain.Pretraining.step

    def interrupted(self, batches):
        if self.iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pretrain.Pretraining, "step", interrupted)
    train(data, out)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "stopped at iteration 4; --resume goes on" in capsys.readouterr().out
    assert saved(out)["iteration"] == 4
    assert not (out / "samples").exists()


def test_damaged_checkpoint_falls_back_to_the_one_before(data, tmp_path, unbroken, capsys):
    out = tmp_path / "out"
    train(data, out)
    last = out / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    train(data, out, "--resume")
    printed = capsys.readouterr().out
    assert f"{last} is damaged" in printed
    assert "going on from previous.pt" in printed
    assert "going on from iteration 3" in printed
    assert_same(weights(out), weights(unbroken))
    assert_same(saved(out)["history"], saved(unbroken)["history"])
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(b"nonsense")
    message = fails("--data", data, "--out", out, "--resume")
    assert str(last) in message
    assert str(out / "previous.pt") in message


def test_code_in_a_checkpoint_is_not_run(data, tmp_path, unbroken):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "run"),))

    out = tmp_path / "out"
    out.mkdir()
    torch.save({"format": pretrain.FORMAT, "settings": Evil()}, out / "last.pt")
    assert "holds more than weights" in fails("--data", data, "--out", out, "--resume")
    assert not (tmp_path / "run").exists()
    torch.save({"weights": torch.zeros(1)}, out / "last.pt")
    assert "no checkpoint of this tool" in fails("--data", data, "--out", out, "--resume")


@pytest.mark.parametrize("parameter", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_overwrites_nothing(
    data, tmp_path, monkeypatch, parameter
):
    out = tmp_path / "out"
    call = pretrain.DiffusionObjective.__call__
    calls = []

    def broken(self, output, *rest):
        terms = call(self, output, *rest)
        calls.append(1)
        if len(calls) == 5:
            if parameter == "loss":
                terms["loss"] = terms["loss"] * float("nan")
            else:  # the root has no derivative at zero
                terms["loss"] = terms["loss"] + (0 * output.flatten(1).sum(1)).abs().sqrt()
        return terms

    monkeypatch.setattr(pretrain.DiffusionObjective, "__call__", broken)
    with pytest.raises(ToolError) as error:
        train(data, out, "--save-every", 4)
    name = "loss" if parameter == "loss" else "grad_norm"
    assert f"iteration 5: {name} is " in str(error.value)
    assert "lower --lr" in str(error.value)
    assert saved(out)["iteration"] == 4
    assert all(torch.isfinite(x).all() for x in weights(out).values())
    monkeypatch.setattr(pretrain.DiffusionObjective, "__call__", call)
    train(data, out, "--save-every", 4, "--resume")


def test_full_disk_keeps_what_was_saved(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = torch.save
    calls = []

    def full(content, path):
        calls.append(path)
        if len(calls) == 3:  # last.pt and unet.pt were written once
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ToolError, match="No space left on device"):
        train(data, out)
    assert saved(out)["iteration"] == 3
    assert not [path for path in out.iterdir() if path.name.startswith((".", "new"))]


def test_runs_are_neither_overwritten_nor_mixed(data, tmp_path, unbroken):
    before = (unbroken / "last.pt").read_bytes()
    assert "holds a run already" in fails("--data", data, "--out", unbroken)
    message = fails("--data", data, "--out", unbroken, "--resume", "--lr", "0.5", "--no-flip")
    assert "lr: 0.0001 there, 0.5 now" in message
    assert "flip: True there, False now" in message
    other = tmp_path / "other"
    write_images(other, COUNT - 1)
    message = fails("--data", other, "--out", unbroken, "--resume")
    assert "images: '7 images, " in message
    assert (unbroken / "last.pt").read_bytes() == before


def test_finished_run_can_go_on(data, tmp_path):
    out = tmp_path / "out"
    train(data, out, "--iterations", 2)
    before = (out / "last.pt").read_bytes()
    train(data, out, "--iterations", 2, "--resume")
    assert (out / "last.pt").read_bytes() == before
    train(data, out, "--iterations", 4, "--resume", "--lr-decay", 1)
    assert saved(out)["iteration"] == 4


# ---------------------------------------------------------------------------------------- pictures


def test_grid_shows_every_image_in_its_place():
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    images = values[:, None, None, None].expand(5, 3, 4, 6)
    pixels = np.asarray(pretrain.draw_grid(images))
    assert pixels.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    centres = [pixels[4 + 6 * (i // 3), 5 + 8 * (i % 3), 0] for i in range(6)]
    assert centres == [0, 64, 128, 191, 255, 255]


@pytest.mark.parametrize("losses", [[1.0], [0.5, 0.5], [1.0, 0.1, 0.01], [0.0, 1.0]])
def test_loss_curve_of_any_length(losses):
    history = [{"iteration": i + 1, "simple": loss} for i, loss in enumerate(losses)]
    assert pretrain.draw_loss(history).size == (740, 450)
