"""Whole training steps of small models. No time is asserted."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import in_process
import pytest
import torch
from image_folders import write_weights
from torch import nn

from diffbackbone import UNet, UNetConfig
from diffbackbone.benchmark import report, steps, training
from diffbackbone.benchmark.steps import Row, StepsConfig
from diffbackbone.benchmark.training import FRAMEWORKS, Case, Framework, Stopwatch, Training
from diffbackbone.benchmark.worker import Worker, count_flops

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "benchmark_steps.py"
FAST = {"unet": "tiny", "sizes": (64,), "head_channels": 16, "device": "cpu"}
FAST |= {"threads": 1, "repeats": 1, "warmup": 0}
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's figures of memory")


def has(model):
    try:
        FRAMEWORKS[model].prepare()
    except ImportError:
        return False
    return True


INSTALLED = [model for model in FRAMEWORKS if has(model)]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    backends = torch.backends.cudnn
    monkeypatch.setattr(backends, "benchmark", backends.benchmark)


@pytest.fixture
def worker(monkeypatch):
    """Runs workers in this process."""
    monkeypatch.setattr(report, "save_figure", lambda *_: None)
    return in_process.use(monkeypatch, steps)


@pytest.fixture(params=list(FRAMEWORKS))
def model(request):
    if request.param not in INSTALLED:
        pytest.skip(f"what {request.param} needs is not installed")
    return request.param


@pytest.fixture
def train(model):
    """Builds a model as a worker does."""

    def build(unet="tiny", checkpoint=None, head_channels=16, **changes):
        batch = steps.DEFAULTS[model][1]
        case = Case(model, "finetuned", "none", 64, batch, "float32", "config")
        case = dataclasses.replace(case, **changes)
        return FRAMEWORKS[model](case, "cpu", unet, checkpoint, head_channels)

    return build


# --------------------------------------------------------------------------------------------------
# whole runs


@pytest.mark.skipif(not INSTALLED, reason="neither framework is installed")
def test_every_kind_of_row(worker, tmp_path, capsys):
    options = {**FAST, "sizes": (32,), "models": INSTALLED, "out": tmp_path}
    rows = steps.run(StepsConfig(**options))
    kinds = [(row.case.model, row.case.mode, row.case.feedback) for row in rows]
    modes, feedbacks = ("frozen", "finetuned"), ("none", "bottleneck")
    assert kinds == [(m, mode, f) for m in INSTALLED for mode in modes for f in feedbacks]
    for row, (model, mode, feedback) in zip(rows, kinds):
        assert (row.status, row.message) == ("ok", "")
        assert (row.case.size, row.case.batch) == (32, {"upernet": 2, "mask_rcnn": 1}[model])
        seconds = row.seconds
        assert set(seconds) == {"step", "forward", "backward", "optimizer"}
        assert (seconds["backward"] == 0) == ((mode, feedback) == ("frozen", "none"))
        assert all(value > 0 for what, value in seconds.items() if what != "backward")
        unet = seconds["forward"] + seconds["backward"]
        assert row.outside_share == pytest.approx(1 - unet / seconds["step"])
        assert sum(row.parts) == pytest.approx(seconds["step"])
        assert 1e6 < row.peak_bytes < 2e9
        assert row.reserved_bytes is None
        assert row.recomputes
    for key in ("flops", "trained"):
        found = {kind: getattr(row, key) for kind, row in zip(kinds, rows)}
        for (model, mode, feedback), number in found.items():
            if mode == "frozen":
                assert 1.2 * number < found[model, "finetuned", feedback]
            if feedback == "none":
                assert number < found[model, mode, "bottleneck"]
    content = json.loads((tmp_path / "steps.json").read_text())
    assert (content["machine"]["threads"], content["machine"]["weights"]) == (1, "random")
    assert [entry["flops"] for entry in content["rows"]] == [row.flops for row in rows]
    markdown = (tmp_path / "steps.md").read_text()
    assert markdown in capsys.readouterr().out
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert f"| **{rows[0].seconds['step']:.4g}** |" in lines[2]
    assert f"| {rows[0].outside_share:.0%} |" in lines[2]


@pytest.mark.skipif("upernet" not in INSTALLED, reason="MMSegmentation is not installed")
@linux
def test_process_that_runs_out_of_memory(tmp_path, monkeypatch):
    import resource

    ask = Worker.ask

    def limit(self, method, **arguments):
        if method == "first":
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            taken = int(re.search(r"VmSize:\s+(\d+)", status)[1]) * 1024
            resource.prlimit(self.process.pid, resource.RLIMIT_AS, (taken + 2**24,) * 2)
        return ask(self, method, **arguments)

    monkeypatch.setattr(Worker, "ask", limit)
    config = StepsConfig(**{**FAST, "sizes": (512,)}, models=("upernet",), modes=("frozen",))
    row = steps.measure(config.plan()[0], config, tmp_path)
    assert (row.status, row.seconds) == ("out of memory", {})
    assert "memory" in row.message


def test_errors_are_rows(worker, monkeypatch, tmp_path):
    errors = {"frozen": MemoryError(), "finetuned": KeyError("a | bug")}

    class Failing(Framework):
        def _build(self):
            raise errors[self.case.mode]

    def missing():
        raise ImportError("mmcv is not installed")

    monkeypatch.setitem(FRAMEWORKS, "mask_rcnn", Failing)
    monkeypatch.setattr(FRAMEWORKS["upernet"], "prepare", staticmethod(missing))
    rows = steps.run(StepsConfig(**FAST, feedback=("none",), out=tmp_path))
    assert [(row.status, row.message) for row in rows] == [
        *[("skipped", "mmcv is not installed")] * 2,
        ("out of memory", "MemoryError"),
        ("error", "KeyError: 'a | bug'"),
    ]
    lines = (tmp_path / "steps.md").read_text().splitlines()
    assert "| **out of memory** |" in lines[-2]
    assert lines[-1].endswith("| KeyError: 'a \\| bug' |")


@pytest.mark.skipif("upernet" not in INSTALLED, reason="MMSegmentation is not installed")
def test_rounds(worker, tmp_path):
    options = {**FAST, "repeats": 2, "warmup": 3}
    config = StepsConfig(**options, models=("upernet",), modes=("frozen",), flops=False)
    row = steps.measure(config.plan()[0], config, tmp_path)
    assert [method for _, method in worker.asked] == ["load", *["time"] * 5, "peak"]
    assert row.flops is None
    rounds = row.all_seconds
    assert row.seconds["step"] == pytest.approx(sum(rounds["step"]) / 2)
    shares = [1 - forward / step for step, forward in zip(rounds["step"], rounds["forward"])]
    assert row.outside_share == pytest.approx(sum(shares) / 2)


# --------------------------------------------------------------------------------------------------
# steps


@pytest.mark.parametrize("feedback", ["none", "bottleneck"])
@pytest.mark.parametrize("mode", ["frozen", "finetuned"])
def test_what_a_step_changes(train, mode, feedback):
    framework = train(mode=mode, feedback=feedback)
    model, optimizer = framework.model, framework.optimizer
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.param_groups[0]["lr"] = 1e-2
    framework.update()
    changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    unet = {name for name in before if ".unet." in name}
    assert bool(changed & unet) == (mode == "finetuned")
    layers = {name for name in before if ".feedback." in name}
    assert bool(layers) == (feedback == "bottleneck")
    assert len(changed & layers) >= 0.6 * len(layers)
    heads = before.keys() - unet - layers
    assert len(changed & heads) > 0.6 * len(heads)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in held}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    assert model.training


def test_optimizer_of_the_config_with_its_state(train, model):
    optimizer = train().optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == ({0.05, 0.0} if model == "upernet" else {0.1, 0.0})
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates[-1] == {"upernet": 2e-5, "mask_rcnn": 2.5e-5}[model]
    assert len(rates) == 1 if model == "upernet" else len(rates) > 20  # layer-wise decay
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        kept = optimizer.state[parameter]
        assert kept["exp_avg"].shape == kept["exp_avg_sq"].shape == parameter.shape
        assert parameter.grad is None


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_allocating_the_state_changes_no_weight(kind):
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    before = copy.deepcopy(layer.state_dict())
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(layer.parameters(), lr=0.5, weight_decay=0.5, **options)
    training.allocate_state(optimizer)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert set(optimizer.state) == {layer.weight}


@pytest.mark.parametrize("feedback", ["none", "bottleneck"])
def test_heads_are_done_when_the_unet_s_backward_pass_begins(train, feedback):
    framework, arrived = train(feedback=feedback), {}
    watch = framework.stopwatch

    def note(name):
        arrived[name] = len(watch._marks["backward"])

    for name, parameter in framework.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: note(name))
    watch.time(framework.update)
    inside = {name for name in arrived if ".unet." in name or ".feedback." in name}
    assert {arrived[name] for name in inside} == {1}
    assert {arrived[name] for name in arrived.keys() - inside} == {0}
    assert len(watch._marks["backward"]) == len(watch._marks["forward"]) == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_stopwatch(monkeypatch, device, feedback, frozen):
    now, waited = [0.0], []

    def take(seconds):
        now[0] += seconds

    class Take(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forward, backward):
            take(forward)
            ctx.seconds = backward
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            take(ctx.seconds)
            return grad, None, None

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(training.worker, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    weight, head = (nn.Parameter(torch.ones(2), requires_grad=x) for x in (not frozen, True))

    def two_taps(x):
        early = Take.apply(x * weight, 1.0, 2.0)
        return {24: Take.apply(early, 4.0, 8.0), 21: early}

    class Passes(nn.Module):
        def forward(self, x):
            return two_taps(x)

    unet = types.SimpleNamespace(forward_features=two_taps)
    backbone = types.SimpleNamespace(unet=unet, feedback=Passes() if feedback else None)
    optimizer = torch.optim.SGD([head, *([] if frozen else [weight])])

    def update():
        take(16.0)
        taps = (backbone.feedback if feedback else unet.forward_features)(torch.ones(2))
        sum(Take.apply(x * head, 32.0, 64.0).sum() for x in taps.values()).backward()
        take(128.0)
        optimizer.step()

    watch = Stopwatch(backbone, optimizer, device)
    optimizer.register_step_pre_hook(lambda *_: take(256.0))  # within the marks
    backward = 0.0 if frozen else 10.0
    expected = {"forward": 5.0, "backward": backward, "optimizer": 256.0}
    expected["step"] = 16 + 5 + 2 * 32 + 2 * 64 + backward + 128 + 256
    for _ in range(2):
        assert watch.time(update) == pytest.approx(expected)
    assert waited == [device] * 4


@linux
def test_first_step_is_no_part_of_the_peak(monkeypatch):
    started, sizes = Training(), iter([50_000_000, 5_000_000])

    def update(_=None):
        torch.ones(next(sizes))
        return {"step": 1.0}

    watch = types.SimpleNamespace(time=update)
    started.framework = types.SimpleNamespace(device="cpu", stopwatch=watch, update=None)
    training.worker.reset_peak("cpu")
    started.baseline = training.worker.peak_bytes("cpu")
    started.first()
    assert started.time() == {"step": 1.0}
    assert 15e6 < started.peak()[0] < 100e6
    started.framework.device, started.baseline = "cuda", 0
    monkeypatch.setattr(training.worker, "peak_bytes", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    assert started.peak() == (5, 7)


def test_attention_is_counted_on_a_cpu():
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            unet, x = UNet(UNetConfig.from_preset("tiny"), 24), torch.zeros(1, 3, 64, 64)
            found.append(count_flops(lambda u=unet, x=x: u.forward_features(x, 90, (24,))))
    assert found[0] == found[1]


# --------------------------------------------------------------------------------------------------
# from options to the model


def test_defaults_are_those_of_the_configs(train, model):
    framework, (size, batch) = train(), steps.DEFAULTS[model]
    framework.head_channels, framework.unet = None, "gd256_uncond"
    for feedback in ("none", "bottleneck"):
        framework.case = dataclasses.replace(framework.case, feedback=feedback)
        cfg = framework.config()
        if model == "upernet":
            assert (cfg.train_dataloader.batch_size, cfg.crop_size) == (batch, (size, size))
            assert cfg.model.backbone.get("feedback") == {"none": None}.get(feedback, feedback)
            assert cfg.model.decode_head.channels == 1024
        else:
            assert (size, batch) == (cfg.INPUT.LSJ.SIZE, 1)  # four GPUs with one image each
            assert {"none": ""}.get(feedback, feedback) == cfg.MODEL.DIFFUSION.FEEDBACK
            assert cfg.MODEL.FPN.OUT_CHANNELS == 256
            assert cfg.MODEL.ROI_BOX_HEAD.FC_DIM == 1024


def test_options_reach_the_model(train, model, tmp_path):
    path = write_weights(tmp_path / "weights.pt")
    framework = train(
        checkpoint=str(path), head_channels=48, size=96, batch=3, activation_checkpointing="off"
    )
    unet, heads = framework.backbone.unet, framework.model
    weights = torch.load(path)
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())
    assert not unet.activation_checkpointing
    assert train(activation_checkpointing="on").backbone.unet.activation_checkpointing
    if model == "upernet":
        assert heads.decode_head.channels == heads.auxiliary_head.channels == 48
        assert framework.backbone.channels[0] == 48
        assert [tuple(x.shape) for x in framework.batch["inputs"]] == [(3, 96, 96)] * 3
        labels = framework.batch["data_samples"][0].gt_sem_seg.data
        assert labels.shape == (1, 96, 96)
        assert (labels == 255).any()
        assert labels[labels != 255].max() < 150
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in heads.modules())
        return
    heads = heads.roi_heads
    assert heads.box_head.conv1.out_channels == heads.mask_head.deconv.out_channels == 48
    assert heads.box_head.output_shape.channels == 48
    batch = next(framework.trainer._data_loader_iter)
    assert [tuple(x["image"].shape) for x in batch] == [(3, 96, 96)] * 3
    instances = batch[0]["instances"]
    boxes = instances.gt_boxes.tensor
    assert len(instances) == 8
    assert 0 <= boxes.min() <= boxes.max() <= 96
    assert torch.allclose(instances.gt_masks.get_bounding_boxes().tensor, boxes, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_the_framework_s(train, model, dtype):
    framework = train()
    assert "Amp" not in type(getattr(framework, "wrapper", None) or framework.trainer).__name__
    framework.case = dataclasses.replace(framework.case, dtype=dtype)
    cfg = framework.config()
    if model == "upernet":
        assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == ("AmpOptimWrapper", dtype)
        assert cfg.optim_wrapper.constructor == "DiffusionOptimWrapperConstructor"
    else:
        assert dict(cfg.SOLVER.AMP) == {"ENABLED": True, "DTYPE": dtype}


def test_list():
    def lines(options):
        command = [sys.executable, SCRIPT, "--list", "--device", "cpu", *shlex.split(options)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    found = lines("")
    assert len(found) == len(set(found)) == 8
    assert found[0] == "upernet frozen 512 px x 2 float32"
    assert found[-1] == "mask_rcnn finetuned bottleneck 1024 px x 1 float32"
    found = lines(
        "--sizes 256 128 256 --batch 4 --dtypes bfloat16 --models mask_rcnn "
        "--activation-checkpointing on off"
    )
    assert len(found) == len(set(found)) == 16
    assert found[0] == "mask_rcnn frozen 128 px x 4 bfloat16 checkpointing on"


def test_chart():
    case = Case("upernet", "frozen", "none", 512, 2, "float32", "config")
    seconds = {"step": 8.0, "forward": 2.0, "backward": 2.0, "optimizer": 2.0}
    good = Row(case, seconds=seconds, outside_share=0.5, peak_bytes=10**9)
    bad = Row(dataclasses.replace(case, mode="finetuned"), status="out of memory")
    times, memory = steps.chart([good, bad], "a CPU").axes
    assert [bar.get_width() for bar in times.patches] == [2.0, 0.0] * 4
    assert [bar.get_width() for bar in memory.patches] == [1.0, 0.0]
    assert steps.chart([bad], "a CPU") is not None
