"""`tools/benchmark_steps.py`: real training steps of small models.

Most rows run in this process, behind the same JSON as in a worker's. No time is asserted, but that
wide heads take a larger share of it than narrow ones.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from image_folders import write_weights
from in_process import InProcess
from torch import nn

from diffbackbone import compat
from diffbackbone.costs import counting_flops
from diffbackbone.unet import UNet, UNetConfig

TOOLS = Path(__file__).resolve().parents[1] / "tools"
STACKS = {"upernet": compat.check_mmseg_stack, "mask_rcnn": compat.check_detectron2_stack}
FAST = ["--unet", "tiny", "--sizes", "64", "--head-channels", "16", "--device", "cpu"]
FAST += ["--threads", "1", "--repeats", "1", "--warmup", "0"]
CONFIGS = {}
"""Of mmseg, by path: reading one takes seconds."""
QUICK = [*FAST, "--models", "upernet", "--modes", "frozen", "--feedback", "none"]


def has(model):
    try:
        STACKS[model]()
    except ImportError:
        return False
    return True


INSTALLED = [model for model in STACKS if has(model)]


@pytest.fixture(scope="module")
def modules():
    names = ("steps", "training", "references")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield [importlib.import_module(f"diffbackbone.benchmark.{name}") for name in names]


@pytest.fixture
def tool(modules):
    return modules[0]


@pytest.fixture
def worker(modules, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("allow_tf32", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    if "upernet" in INSTALLED:
        compat.apply_mmengine_repairs()
        from mmengine.config import Config

        def read(path, from_file=Config.fromfile):
            if path not in CONFIGS:
                CONFIGS[path] = from_file(path)
            return copy.deepcopy(CONFIGS[path])

        monkeypatch.setattr(Config, "fromfile", read)
    return modules[1]


@pytest.fixture
def asked(tool, worker, modules, monkeypatch):
    """Runs workers in this process; gives the commands asked for, with who was asked."""

    class Steps(InProcess):
        def make(self, args):
            return worker.StepsWorker(args.threads)

    Steps.tool, Steps.worker, Steps.commands = tool, modules[2], []
    monkeypatch.setattr(tool, "Worker", Steps)
    return Steps.commands


@pytest.fixture
def no_chart(tool, monkeypatch):
    monkeypatch.setattr(tool, "chart", lambda machine, rows: None)


@pytest.fixture
def run(tool, tmp_path):
    """Runs the command line; gives what the JSON file holds."""

    def start(*arguments):
        out = tmp_path / "out"
        tool.main([*arguments, "--out", str(out)])
        return json.loads((out / "steps.json").read_text())

    return start


@pytest.fixture(params=["upernet", "mask_rcnn"])
def model(request):
    if request.param not in INSTALLED:
        pytest.skip(f"what {request.param} needs is not installed")
    return request.param


@pytest.fixture
def job(tool, model):
    """A case for the worker."""
    return {
        "model": model, "mode": "finetuned", "feedback": "none", "size": 64,
        "batch": tool.MODELS[model].batch,
        "dtype": "float32", "activation_checkpointing": "config", "unet": "tiny",
        "config": tool.MODELS[model].configs["none"], "checkpoint": None, "head_channels": 16,
        "device": "cpu",
    }  # fmt: skip


@pytest.fixture
def train(tool, worker, job):
    """Builds a model as a worker does, with other options."""

    def build(**options):
        chosen = {**job, **options}
        chosen["config"] = tool.MODELS[job["model"]].configs[chosen["feedback"]]
        worker.TRAININGS[job["model"]].prepare()
        return worker.TRAININGS[job["model"]](chosen)

    return build


# --------------------------------------------------------------------------------------------------
# whole runs


@pytest.mark.skipif(not INSTALLED, reason="neither framework is installed")
def test_every_kind_of_row(asked, run, no_chart, tmp_path, capsys):
    content = run(*FAST, "--sizes", "32", "--models", *INSTALLED)
    rows = content["rows"]
    kinds = [(row["model"], row["mode"], row["feedback"]) for row in rows]
    assert kinds == [
        (model, mode, feedback)
        for model in INSTALLED
        for mode in ("frozen", "finetuned")
        for feedback in ("none", "bottleneck")
    ]
    for row, (model, mode, feedback) in zip(rows, kinds):
        assert (row["status"], row["message"]) == ("ok", "")
        assert (row["size"], row["batch"]) == (32, {"upernet": 2, "mask_rcnn": 1}[model])
        seconds = row["seconds"]
        assert set(seconds) == {"step", "forward", "backward", "optimizer"}
        no_backward = (mode, feedback) == ("frozen", "none")
        assert (seconds["backward"] == 0) == no_backward
        assert all(value > 0 for what, value in seconds.items() if what != "backward")
        assert row["all_seconds"] == {what: [value] for what, value in seconds.items()}
        unet = seconds["forward"] + seconds["backward"]
        assert row["outside_share"] == pytest.approx(1 - unet / seconds["step"])
        assert 0 < row["outside_share"] < 1
        assert unet + seconds["optimizer"] < seconds["step"]
        assert 1e6 < row["peak_bytes"] < 2e9
        assert row["reserved_bytes"] is None
        assert 0 < row["trained"] <= row["parameters"]
        assert row["recomputes"]
    for key in ("flops", "trained"):
        by_kind = {kind: row[key] for kind, row in zip(kinds, rows)}
        for (model, mode, feedback), number in by_kind.items():
            if mode == "frozen":
                assert 1.2 * number < by_kind[model, "finetuned", feedback]
            if feedback == "none":
                assert number < by_kind[model, mode, "bottleneck"]
    assert content["machine"]["threads"] == 1
    assert content["machine"]["weights"] == "random"
    assert content["machine"]["command"].startswith("benchmark_steps.py --unet tiny")
    markdown = (tmp_path / "out" / "steps.md").read_text()
    assert markdown in capsys.readouterr().out
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    assert f"| **{rows[0]['seconds']['step']:.4g}** |" in lines[2]
    assert f"| {rows[0]['outside_share']:.0%} |" in lines[2]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["steps.json", "steps.md"]
    asked.clear()
    (row,) = run(
        *FAST, "--sizes", "32", "--models", INSTALLED[0], "--modes", "frozen",
        "--feedback", "none", "--no-flops",
    )["rows"]  # fmt: skip
    assert row["flops"] is None
    assert row["seconds"]["step"] > 0
    assert row["peak_bytes"] > 1e6
    assert "first" not in [command for _, command in asked]


@pytest.mark.skipif("upernet" not in INSTALLED, reason="MMSegmentation is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's")
def test_processes_one_of_which_runs_out_of_memory(tool, run, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    ask = tool.Worker.ask

    def limit(self, command, **arguments):
        if command == "first" and self.small:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            taken = int(re.search(r"VmSize:\s+(\d+)", status)[1]) * 1024
            resource.prlimit(self.process.pid, resource.RLIMIT_AS, (taken + 2**24,) * 2)
        self.small = "job" in arguments and arguments["job"]["size"] == 512
        return ask(self, command, **arguments)

    monkeypatch.setattr(tool.Worker, "ask", limit)
    monkeypatch.setattr(tool.Worker, "small", False, raising=False)
    ok, failed = run(*QUICK, "--sizes", "64", "512")["rows"]
    assert (ok["status"], ok["size"]) == ("ok", 64)
    assert 5e6 < ok["peak_bytes"] < 400e6
    assert (failed["status"], failed["size"]) == ("out of memory", 512)
    assert "memory" in failed["message"]
    assert failed["seconds"] == {}
    if importlib.util.find_spec("PIL"):
        assert (tmp_path / "out" / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_is_a_row_that_says_so(asked, run, worker, monkeypatch, no_chart, tmp_path):
    class Failing(worker.Training):
        prepare = staticmethod(lambda: None)

        def build(self):
            raise MemoryError if self.job["mode"] == "frozen" else KeyError("a | bug")

    monkeypatch.setitem(worker.TRAININGS, "mask_rcnn", Failing)
    for check in STACKS.values():
        monkeypatch.setattr(compat, check.__name__, lambda: None)
    rows = run(*FAST, "--models", "mask_rcnn", "--feedback", "none")["rows"]
    assert [row["status"] for row in rows] == ["out of memory", "error"]
    assert [row["message"] for row in rows] == ["MemoryError", "KeyError: 'a | bug'"]
    assert {row["outside_share"] for row in rows} == {None}
    lines = (tmp_path / "out" / "steps.md").read_text().splitlines()
    assert "| **out of memory** |" in lines[-2]
    assert lines[-1].endswith("| KeyError: 'a \\| bug' |")
    assert len({re.sub(r"\\\|", "", line).count("|") for line in lines[-4:]}) == 1


def test_what_is_not_installed_is_a_row_that_says_so(asked, run, monkeypatch, no_chart):
    def missing():
        raise ImportError("MMSegmentation cannot run\n  - mmcv is not installed")

    monkeypatch.setattr(compat, "check_mmseg_stack", missing)
    (row,) = run(*QUICK)["rows"]
    assert (row["status"], row["seconds"]) == ("skipped", {})
    assert "mmcv is not installed" in row["message"]
    assert asked == [("machine", "machine")]  # no model was built


def test_half_precision_needs_a_gpu(tool, monkeypatch):
    for check in STACKS.values():
        monkeypatch.setattr(compat, check.__name__, lambda: None)
    for case in tool.plan(tool.parse([*FAST, "--dtypes", "bfloat16", "float16"])):
        words = f"{case.dtype}: the frameworks' mixed precision needs a GPU"
        assert tool.unavailable(case, "cpu") == words
        assert tool.unavailable(case, "cuda") == ""
        assert tool.unavailable(dataclasses.replace(case, dtype="float32"), "cpu") == ""


@pytest.mark.skipif("upernet" not in INSTALLED, reason="MMSegmentation is not installed")
def test_an_interrupted_run_keeps_what_it_has(asked, tool, run, no_chart, tmp_path, monkeypatch):
    def interrupt(self, command):
        if asked.count(("steps", "load")) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tool.Worker, "on_ask", interrupt)
    with pytest.raises(SystemExit) as caught:
        run(*QUICK, "--feedback", "none", "bottleneck", "--repeats", "2", "--warmup", "3")
    assert caught.value.code == 130
    content = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert (len(content["rows"]), content["planned"]) == (1, 2)
    assert asked.count(("steps", "time")) == 3 + 2
    (row,) = content["rows"]
    rounds = row["all_seconds"]
    assert row["seconds"]["step"] == pytest.approx(sum(rounds["step"]) / 2)
    shares = [1 - forward / step for step, forward in zip(rounds["step"], rounds["forward"])]
    assert row["outside_share"] == pytest.approx(sum(shares) / 2)


# --------------------------------------------------------------------------------------------------
# steps


@pytest.mark.parametrize("feedback", ["none", "bottleneck"])
@pytest.mark.parametrize("mode", ["frozen", "finetuned"])
def test_what_a_step_changes(train, mode, feedback):
    training = train(mode=mode, feedback=feedback)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    training.optimizer.param_groups[0]["lr"] = 1e-2
    training.update()
    changed = {n for n, p in training.model.named_parameters() if not torch.equal(before[n], p)}
    unet = {name for name in before if ".unet." in name}
    assert bool(changed & unet) == (mode == "finetuned")
    layers = {name for name in before if ".feedback." in name}
    assert bool(layers) == (feedback == "bottleneck")
    assert len(changed & layers) >= 0.6 * len(layers)
    heads = before.keys() - unet - layers
    assert len(changed & heads) > 0.6 * len(heads)
    held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in training.model.named_parameters() if id(p) in held}
    assert names == {name for name, p in training.model.named_parameters() if p.requires_grad}
    assert training.model.training


def test_the_optimizer_is_the_config_s(train, model):
    groups = train().optimizer.param_groups
    assert isinstance(train().optimizer, torch.optim.AdamW)
    decays = {group["weight_decay"] for group in groups}
    assert decays == ({0.05, 0.0} if model == "upernet" else {0.1, 0.0})
    rates = sorted({group["lr"] for group in groups})
    if model == "upernet":
        assert rates == [2e-5]
    else:  # layer-wise decay
        assert rates[-1] == 2.5e-5
        assert len(rates) > 20


def test_the_optimizer_s_state_is_there_from_the_start(train):
    optimizer = train(mode="finetuned").optimizer
    for group in optimizer.param_groups:
        assert group["lr"] > 0
        for parameter in group["params"]:
            kept = optimizer.state[parameter]
            assert kept["exp_avg"].shape == kept["exp_avg_sq"].shape == parameter.shape
            assert parameter.grad is None


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_allocating_the_state_changes_no_weight(worker, kind):
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    before = copy.deepcopy(layer.state_dict())
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(layer.parameters(), lr=0.5, weight_decay=0.5, **options)
    worker.allocate_state(optimizer)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert set(optimizer.state) == {layer.weight}


@pytest.mark.parametrize("feedback", ["none", "bottleneck"])
def test_heads_are_through_when_the_unet_s_backward_pass_begins(train, feedback):
    training = train(feedback=feedback)
    watch, arrived = training.stopwatch, {}

    def note(name):
        arrived[name] = len(watch._marks["backward"])

    for name, parameter in training.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: note(name))
    watch.time(training.update)
    inside = {name for name in arrived if ".unet." in name or ".feedback." in name}
    assert {arrived[name] for name in inside} == {1}
    assert {arrived[name] for name in arrived.keys() - inside} == {0}
    assert len(watch._marks["backward"]) == len(watch._marks["forward"]) == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_stopwatch(worker, monkeypatch, device, feedback, frozen):
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

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(worker, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    weight, head = (
        nn.Parameter(torch.ones(2), requires_grad=not frozen),
        nn.Parameter(torch.ones(2)),
    )

    def two_taps(x):
        early = Take.apply(x * weight, 1.0, 2.0)
        return {24: Take.apply(early, 4.0, 8.0), 21: early}

    class Passes(nn.Module):
        def forward(self, x):
            return two_taps(x)

    unet = types.SimpleNamespace(forward_features=two_taps)
    backbone = types.SimpleNamespace(unet=unet, feedback=Passes() if feedback else None)
    optimizer = torch.optim.SGD([head, *([] if frozen else [weight])])
    optimizer.zero_grad = None  # that is the frameworks' business

    def update():
        take(16.0)
        taps = (backbone.feedback if feedback else unet.forward_features)(torch.ones(2))
        loss = sum(Take.apply(x * head, 32.0, 64.0).sum() for x in taps.values())
        loss.backward()
        take(128.0)
        optimizer.step()

    watch = worker.Stopwatch(backbone, optimizer, device)
    optimizer.register_step_pre_hook(lambda *_: take(256.0))  # within the marks
    for _ in range(2):  # the marks of one step are no other's
        found = watch.time(update)
        backward = 0.0 if frozen else 10.0
        expected = {"forward": 5.0, "backward": backward, "optimizer": 256.0}
        total = 16 + 5 + 2 * 32 + 2 * 64 + backward + 128 + 256
        assert found == pytest.approx({**expected, "step": total})
    assert waited == [device] * 4


def share(worker, training, repeats=3):
    training.stopwatch.time(training.update)
    shares = []
    for _ in range(repeats):
        seconds = training.stopwatch.time(training.update)
        shares.append(1 - (seconds["forward"] + seconds["backward"]) / seconds["step"])
    return sorted(shares)[repeats // 2]


def test_wide_heads_take_a_larger_share(worker, train, model, monkeypatch):
    clock = worker.time.process_time  # other processes don't count
    monkeypatch.setattr(worker.time, "perf_counter", clock)
    narrow = share(worker, train(mode="frozen"))
    wide = share(worker, train(mode="frozen", head_channels=256 if model == "upernet" else 128))
    assert 0 < narrow < wide < 1


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be begun anew on Linux only")
def test_large_images_take_more_memory(worker, job, modules):
    peaks = []
    for size in (64, 192):
        started = worker.StepsWorker(1)
        started.load({**job, "size": size, "mode": "frozen"})
        started.first()
        started.time(1)
        peaks.append(started.peak()["peak_bytes"])
    assert peaks[1] > peaks[0] + 20e6


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be begun anew on Linux only")
def test_the_first_step_is_no_part_of_the_peak(worker):
    started, sizes = worker.StepsWorker(1), iter([50_000_000, 5_000_000])

    def update(_=None):
        torch.ones(next(sizes))
        return {"step": 1.0}

    watch = types.SimpleNamespace(time=update)
    started.training = types.SimpleNamespace(job={"device": "cpu"}, stopwatch=watch, update=None)
    started.begin("cpu")
    started.first()
    assert started.time(1) == {"step": 1.0}
    assert 15e6 < started.peak()["peak_bytes"] < 100e6


def test_a_peak_on_a_gpu(worker, monkeypatch):
    started = worker.StepsWorker(1)
    started.training = types.SimpleNamespace(job={"device": "cuda"})
    started.baseline = 0
    monkeypatch.setattr(worker, "peak_bytes", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    assert started.peak() == {"peak_bytes": 5, "reserved_bytes": 7}
    assert torch.backends.cudnn.allow_tf32  # as the frameworks have it


def test_attention_is_counted_on_a_cpu(worker):
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            unet, x = UNet(UNetConfig.from_preset("tiny"), 24), torch.zeros(1, 3, 64, 64)
        with torch.no_grad(), counting_flops() as counter:
            worker.count_attention(counter.flop_registry)
            unet.forward_features(x, 90, (24,))
        found.append(counter.get_total_flops())
    assert found[0] == found[1]


# --------------------------------------------------------------------------------------------------
# from the command line to the model


def test_defaults_are_those_of_the_configs(tool, worker, train, model, job):
    training = train()
    size, batch = tool.MODELS[model].size, tool.MODELS[model].batch
    for feedback in tool.FEEDBACK:
        name = tool.MODELS[model].configs[feedback]
        training.job = {**job, "config": name, "head_channels": None, "unet": "gd256_uncond"}
        if model == "upernet":
            from mmengine.config import Config

            cfg = Config.fromfile(str(TOOLS.parent / "configs/mmseg" / name))
            assert (cfg.train_dataloader.batch_size, cfg.crop_size) == (batch, (size, size))
            backbone = training.config().model.backbone
            assert backbone.get("feedback") == (None if feedback == "none" else feedback)
            assert backbone.unet == cfg.model.backbone.unet
            assert training.config().model.decode_head == cfg.model.decode_head
        else:
            cfg = training.config()
            assert (size, batch) == (cfg.INPUT.LSJ.SIZE, 1)  # four GPUs with one image each
            strategy = cfg.MODEL.DIFFUSION.FEEDBACK
            assert strategy == ("" if feedback == "none" else feedback)
            assert cfg.MODEL.FPN.OUT_CHANNELS == 256
            assert cfg.MODEL.ROI_BOX_HEAD.FC_DIM == 1024


def test_options_reach_the_model(train, job, model):
    recomputes = [
        train(activation_checkpointing=how).backbone.unet.activation_checkpointing
        for how in ("config", "on", "off")
    ]
    assert recomputes == [True, True, False]
    training = train(head_channels=48, size=96, batch=3)
    if model == "upernet":
        assert training.model.decode_head.channels == training.backbone.channels[0] == 48
        assert training.model.auxiliary_head.channels == 48
        assert [tuple(x.shape) for x in training.batch["inputs"]] == [(3, 96, 96)] * 3
        labels = training.batch["data_samples"][0].gt_sem_seg.data
        assert labels.shape == (1, 96, 96)
        assert (labels == 255).any()
        assert labels[labels != 255].max() < 150
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in training.model.modules())
    else:
        heads = training.model.roi_heads
        assert heads.box_head.conv1.out_channels == heads.mask_head.deconv.out_channels == 48
        assert heads.box_head.output_shape.channels == 48
        batch = next(training.trainer._data_loader_iter)
        assert [tuple(x["image"].shape) for x in batch] == [(3, 96, 96)] * 3
        instances = batch[0]["instances"]
        boxes = instances.gt_boxes.tensor
        assert len(instances) == 8
        assert boxes.min() >= 0
        assert boxes.max() <= 96
        assert torch.allclose(instances.gt_masks.get_bounding_boxes().tensor, boxes, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_the_framework_s(train, job, model, dtype):
    training = train()
    assert "Amp" not in type(getattr(training, "wrapper", None) or training.trainer).__name__
    training.job = {**job, "dtype": dtype}
    cfg = training.config()
    if model == "upernet":
        assert cfg.optim_wrapper.type == "AmpOptimWrapper"
        assert cfg.optim_wrapper.dtype == dtype
        assert cfg.optim_wrapper.constructor == "DiffusionOptimWrapperConstructor"
    else:
        amp = cfg.SOLVER.AMP
        assert dict(amp) == {"ENABLED": True, "DTYPE": dtype}
        training.job = job
        assert not training.config().SOLVER.AMP.ENABLED


def test_a_checkpoint_is_loaded(train, tmp_path):
    path = write_weights(tmp_path / "weights.pt")
    weights = torch.load(path)
    found = train(checkpoint=str(path)).backbone.unet.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in found.items())


def test_rows(tool, capsys):
    tool.main(["--list", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 8
    assert lines[0] == "upernet frozen 512 px x 2 float32"
    assert lines[-1] == "mask_rcnn finetuned bottleneck 1024 px x 1 float32"
    options = ["--sizes", "256", "128", "256", "--batch", "4", "--dtypes", "bfloat16"]
    options += ["--activation-checkpointing", "on", "off", "--models", "mask_rcnn"]
    tool.main(["--list", *options])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 16
    assert lines[0] == "mask_rcnn frozen 128 px x 4 bfloat16 checkpointing on"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--models", "retinanet"],
            "invalid choice: 'retinanet' .choose from .*upernet.*mask_rcnn",
        ),
        (["--modes", "forward"], "invalid choice: 'forward' .choose from .*frozen.*finetuned"),
        (["--feedback", "all"], "invalid choice: 'all' .choose from .*none.*bottleneck"),
        (["--dtypes", "int8"], "invalid choice: 'int8' .choose from .*float32"),
        (["--activation-checkpointing", "yes"], "invalid choice: 'yes' .choose from .*config"),
        (["--sizes", "0"], "invalid positive number value: '0'"),
        (["--sizes", "96", "100"], r"--sizes must be multiples of 32, got \[100\]"),
        (["--batch", "0"], "invalid positive number value: '0'"),
        (["--head-channels", "-1"], "invalid positive number value: '-1'"),
        (["--warmup", "-1"], "--warmup can't be negative, got -1"),
        (["--timeout", "0"], "--timeout must be positive, got 0.0"),
        (["--unet", "gd257"], "unknown preset 'gd257'; choose from gd64"),
        (["--checkpoint", "/nowhere/x.pth"], "there is no checkpoint '/nowhere/x.pth'"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
    ],
)
def test_bad_arguments(tool, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tool, "Worker", None)  # before any process is started
    with pytest.raises(SystemExit) as caught:
        tool.main([*FAST, "--out", str(tmp_path / "out"), *options])
    text = capsys.readouterr().err + str(caught.value.code)
    assert re.search(words, text), text
    assert caught.value.code != 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", [(), ("matplotlib",), ("matplotlib", "PIL")])
def test_chart(tool, monkeypatch, missing):
    for name in ("matplotlib", "PIL"):
        if name not in missing:
            pytest.importorskip(name)
    case = tool.Case("upernet", "frozen", "none", 512, 2, "float32", "config")
    seconds = {"step": 8.0, "forward": 2.0, "backward": 2.0, "optimizer": 2.0}
    good = tool.Row(case, seconds=seconds, outside_share=0.5, peak_bytes=10**9)
    bad = tool.Row(dataclasses.replace(case, mode="finetuned"), status="out of memory")
    for name in missing:
        for known in [key for key in sys.modules if key.split(".")[0] == name]:
            monkeypatch.setitem(sys.modules, known, None)
        monkeypatch.setitem(sys.modules, name, None)
    assert good.parts == [2.0, 2.0, 2.0, 2.0]
    picture = tool.chart({"cpu": "x"}, [good, bad])
    if "PIL" in missing:
        assert picture is None
        return
    pixels = [tuple(pixel) for pixel in picture.convert("RGB").getdata()]
    first, *others = (
        pixels.count(tuple(bytes.fromhex(color[1:]))) for color in tool._benchmark.COLORS
    )
    assert min(others) > 100
    assert max(others) < 1.4 * min(others)  # four equal parts
    assert first > 2 * max(others)  # the memory's bar too
    assert tool.chart({"cpu": "x"}, [bad]) is not None
