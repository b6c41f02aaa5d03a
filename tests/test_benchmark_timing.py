"""The backbone beside published code: what is compared and reported. No time is asserted.

Small packages stand in for the references.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import in_process
import pytest
import torch

from diffbackbone import UNet, UNetConfig
from diffbackbone.benchmark import references, report, timing
from diffbackbone.benchmark.references import Case, Measurements
from diffbackbone.benchmark.timing import BenchmarkConfig, Row
from diffbackbone.benchmark.worker import Worker, WorkerError, count_flops, out_of_memory
from diffbackbone.utils import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "benchmark.py"
TINY = UNetConfig.from_preset("tiny")
UNET = """
import torch
from diffbackbone import UNet, UNetConfig
from . import logger
class UNetModel(UNet):
    def __init__(self, attention_resolutions, use_fp16, **fields):
        super().__init__(UNetConfig(attention_strides=attention_resolutions, **fields))
        self.model_channels, self.dtype = self.config.model_channels, torch.float32
        self.time_embed.register_forward_hook(self.hook)
        {init}
    def hook(self, module, inputs, x):
        {hook}
        return x
"""
REENTRANT = (
    "from torch.utils.checkpoint import checkpoint; block = self.input_blocks[1]; "
    "block.forward = lambda x, emb: checkpoint("
    "lambda x, emb: type(block).forward(block, x.view(x.shape), emb), x, emb, use_reentrant=True)"
)
DIFFSSL = """
import torch
from torch import nn
from torchinfo import summary
from diffbackbone import UNetConfig
DM_FEAT_DIM_DICT = {b: i.channels for b, i in UNetConfig.from_preset("tiny").blocks.items()}
class DiffSSLModelFeedbackFusion(nn.Module):
    def __init__(self, encoder, diffusion, head, device, mode, feedback_arch, use_feedback,
                 feedback_b_list, first_fw_b_list, second_fw_b_list):
        super().__init__()
        assert mode in ("freeze", "finetune") and feedback_arch == "C_B_R"
        self.encoder, self.diffusion, self.head = encoder, diffusion, head
        self.device, self.feedback_b_list = device, feedback_b_list
        self.first, self.second = first_fw_b_list, second_fw_b_list
        assert max(first_fw_b_list + second_fw_b_list + feedback_b_list) <= 37
        if mode == "freeze":
            encoder.requires_grad_(False)
        table = DM_FEAT_DIM_DICT
        self.feedback_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(table[b], table[38 - b], 1, bias=False),
                          nn.BatchNorm2d(table[38 - b]), nn.ReLU()) for b in feedback_b_list)
    def convert_to_fp32(self):
        self.use_fp16 = False
    def forward(self, x, t):
        assert not self.use_fp16
        (step,) = t
        steps = torch.full((x.shape[0],), step, device=self.device)
        x = self.diffusion.q_sample(x, steps, noise=torch.randn_like(x))
        steps = self.diffusion._scale_timesteps(steps)
        if not self.second:
            first = [list(self.encoder.forward_features(x, steps, self.first).values())]
            return self.head(self.first, first, self.second, [], t)
        sources = self.feedback_b_list
        with torch.no_grad():
            taps = self.encoder.forward_features(x, steps, sources)
        inject = {38 - b: layer(taps[b]) for b, layer in zip(sources, self.feedback_layers)}
        maps = self.encoder.forward_features(x, steps, self.second, inject=inject)
        return self.head(self.first, [[]], self.second, [list(maps.values())], t)
"""


@pytest.fixture
def checkout(tmp_path):
    """Writes something like a checkout of a reference; returns the option for it."""

    def write(name="guided-diffusion", init="pass", hook="pass", diffssl=DIFFSSL):
        folder = tmp_path / f"a {name}"
        package = folder / "guided_diffusion"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "logger.py").write_text("from mpi4py import MPI\n")
        (package / "nn.py").write_text(
            "from diffbackbone.models.guided_diffusion import timestep_embedding\n"
        )
        (package / "unet.py").write_text(UNET.format(init=init, hook=hook))
        if name == "diffssl":
            (folder / "ssl_diff").mkdir()
            (folder / "ssl_diff" / "__init__.py").write_text(diffssl)
        return {f"reference_{name.replace('-', '_')}": folder}

    return write


@pytest.fixture
def worker(monkeypatch):
    """Runs workers in this process."""
    kind = in_process.use(monkeypatch, timing)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("allow_tf32", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))

    def forget(who=None, method="load"):
        if method == "load":
            for name in list(sys.modules):
                if name.split(".")[0] in ("guided_diffusion", "ssl_diff", *references.STAND_INS):
                    monkeypatch.delitem(sys.modules, name)

    kind.before = staticmethod(forget)
    monkeypatch.setattr(report, "save_figure", lambda *_: None)
    yield kind
    forget()


@pytest.fixture
def run(worker, tmp_path):
    def start(*cases, **options):
        fast = {"unet": "tiny", "sizes": (32,), "device": "cpu", "repeats": 1, "warmup": 0}
        fast |= {"min_seconds": 1e-9, "peak_seconds": 1e-4, "out": tmp_path / "out"}
        return timing.run(BenchmarkConfig(**{**fast, "cases": cases, **options}))

    return start


# --------------------------------------------------------------------------------------------------
# processes


def leftovers():
    return set(Path(tempfile.gettempdir()).glob("diffbackbone-benchmark-*"))


def test_command_with_processes(checkout, tmp_path):
    before, out = leftovers(), tmp_path / "out"
    (folder,) = checkout(init=REENTRANT).values()
    options = shlex.split(
        "--unet tiny --sizes 32 --device cpu --repeats 2 --warmup 0 --min-seconds 1e-9 "
        "--peak-seconds 1e-4 --cases b24 windowed --modes finetuned --threads 1"
    )
    paths = ["--reference-guided-diffusion", folder, "--out", out]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, *paths], capture_output=True, text=True, check=True
    )
    content = json.loads((out / "benchmark.json").read_text())
    timed, skipped = content["rows"]
    assert timed["status"] == "ok", timed["message"]
    assert timed["difference"] < 1e-4
    assert timed["gradient_difference"] < 1e-3
    names = ["ours", "guided-diffusion"]
    assert list(timed["all_seconds"]) == names
    rounds = [theirs / ours for ours, theirs in zip(*timed["all_seconds"].values())]
    assert len(rounds) == 2
    assert timed["ratio"] == pytest.approx(statistics.median(rounds))
    assert timed["ratio_range"] == pytest.approx([min(rounds), max(rounds)])
    unet = UNet(TINY, 24)
    features = unet.forward_features
    flops = count_flops(lambda: features(torch.zeros(1, 3, 32, 32), 90, (24,))[24].sum().backward())
    assert timed["flops"]["ours"] == pytest.approx(flops, rel=1e-4)
    assert 1.01 * flops < timed["flops"]["guided-diffusion"] < 1.3 * flops  # runs a block twice
    peak = content["machine"]["matmul_peaks"]["float32"]
    for who in names:
        assert timed["seconds"][who] == pytest.approx(statistics.median(timed["all_seconds"][who]))
        assert 1e6 < timed["peak_bytes"][who] < 500e6
        per_second = timed["flops"][who] / timed["seconds"][who]
        assert timed["flops_per_second"][who] == pytest.approx(per_second)
        assert timed["matmul_share"][who] == pytest.approx(per_second / peak)
    assert (skipped["case"], skipped["status"]) == ("windowed", "skipped")
    machine = content["machine"]
    assert machine["torch"] == torch.__version__
    assert (machine["threads"], machine["device"], machine["weights"]) == (1, "cpu", "random")
    assert "--cases b24 windowed" in machine["command"]
    assert (out / "benchmark.md").read_text() in done.stdout
    assert "2/2" in done.stderr
    assert {path.name for path in out.iterdir()} == {
        f"benchmark.{x}" for x in ("json", "md", "png")
    }
    assert leftovers() == before


class Target:
    """What a real worker holds."""

    def threads(self):
        return torch.get_num_threads()

    def fail(self):
        raise KeyError("a bug")

    def miss(self):
        raise ImportError("no such package")

    def be_killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def exit(self):
        sys.exit("the last line of the log")

    def sleep(self):
        time.sleep(60)


@pytest.mark.parametrize(
    ("method", "kind", "words"),
    [
        ("be_killed", "out of memory", "be_killed.*killed"),
        ("exit", "error", "exit code 1: the last line of the log"),
        ("sleep", "timeout", "sleep: more than"),
    ],
)
def test_process_that_ends(tmp_path, method, kind, words):
    started = Worker(Target, tmp_path / "log", 60, threads=3)
    assert started.ask("threads") == 3
    for name, expected in (("fail", "error"), ("miss", "skipped")):
        with pytest.raises(WorkerError) as caught:
            started.ask(name)
        assert caught.value.kind == expected
    started.deadline = time.monotonic() + 0.5 if method == "sleep" else started.deadline
    with pytest.raises(WorkerError, match=words) as caught:
        started.ask(method)
    assert caught.value.kind == kind
    with pytest.raises(WorkerError):
        started.ask("threads")
    started.close()


def test_errors_that_say_memory_ran_out():
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert not out_of_memory(ValueError("can't allocate memory"))


# --------------------------------------------------------------------------------------------------
# comparing


def test_all_cases_against_diffssl(run, checkout):
    rows = run(*references.CASES, batch=2, **checkout("diffssl"))
    assert [row.case.case for row in rows] == list(references.CASES)
    for row in rows:
        assert (row.status, row.message) == ("ok", "")
        assert row.difference < 1e-4
        assert row.gradient_difference is None
        assert row.ratio > 0
    flops = rows[-1].flops
    assert flops["ours"] < 0.95 * flops["diffssl"]  # the first blocks run once


def test_training_against_diffssl(run, checkout):
    rows = run("windowed", modes=("frozen", "finetuned"), sizes=(64,), **checkout("diffssl"))
    assert [row.status for row in rows] == ["ok"] * 2, rows
    assert max(row.difference for row in rows) < 1e-4
    assert all(0 <= row.gradient_difference < 1e-2 for row in rows)


def test_half_precision(run, checkout):
    row, skipped = run("b24", dtypes=("bfloat16", "float16"), **checkout())
    assert row.status == "ok", row
    assert row.dtypes == {"ours": "bfloat16", "guided-diffusion": "bfloat16 (autocast)"}
    assert 1e-4 < row.difference < 0.1
    assert set(row.matmul_share) == {"ours", "guided-diffusion"}
    assert skipped.status == "skipped"


def test_they_take_turns(run, checkout, worker):
    run("b24", repeats=3, warmup=2, **checkout())
    ours, theirs = "ours", "guided-diffusion"
    timed = [who for who, method in worker.asked if method == "time"]
    assert timed == [ours] * 2 + [theirs] * 2 + [ours, theirs, theirs, ours, ours, theirs]
    assert worker.asked.index((theirs, "first")) < worker.asked.index((ours, "time"))


@pytest.mark.parametrize(
    ("options", "mode", "words"),
    [
        ({"hook": "x = x + 0.1"}, "forward", "outputs"),
        (
            {"init": "self.input_blocks[0].register_forward_hook(lambda m,i,x: 2*x - x.detach())"},
            "finetuned",
            "gradients",
        ),
    ],
)
def test_what_differs_is_wrong_and_not_timed(run, checkout, worker, options, mode, words):
    (row,) = run("b24", modes=(mode,), **checkout(**options))
    assert row.status == "wrong"
    assert row.message.startswith(words)
    assert (row.difference > 1e-4) == (words == "outputs")
    assert (row.ratio, row.seconds) == (None, {})
    assert set(row.peak_bytes) == {"ours", "guided-diffusion"}
    assert "time" not in [method for _, method in worker.asked]


@pytest.mark.parametrize(
    ("theirs", "status"),
    [
        ([[1.0, 1.0 + 2e-4]], "wrong"),
        ([[1.0, 1.0 + 5e-5]], "ok"),
        ([[1.0, float("nan")]], "wrong"),
        ([[1.0, 1.0, 1.0]], "wrong"),
        ([[1.0, 1.0], [1.0, 1.0]], "wrong"),
    ],
)
def test_comparison(tmp_path, theirs, status):
    for who, maps in (("ours", [[1.0, 1.0]]), ("diffssl", theirs)):
        torch.save([torch.tensor(x) for x in maps], tmp_path / f"{who}.outputs.pt")
        torch.save({}, tmp_path / f"{who}.gradients.pt")
    row = Row(Case("b24", 32, 1, "float32", "forward", "eager", "diffssl"))
    timing.compare(row, tmp_path)
    assert row.status == status


# --------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    ("hook", "status"),
    [("raise KeyError('their bug')", "error"), ("raise MemoryError", "out of memory")],
)
def test_reference_that_fails(run, checkout, hook, status):
    rows = run("b24", "taps", **checkout(hook=hook))
    assert [row.case.case for row in rows] == ["b24", "taps"]
    for row in rows:
        assert (row.status, row.ratio) == (status, None)
        assert row.message.startswith("guided-diffusion: ")
        assert list(row.seconds) == ["ours"]


def test_failure_while_timed(run, checkout, worker):
    load = worker.before

    def fail(who, method):
        load(who, method)
        if worker.asked.count(("ours", "time")) == 3:
            raise WorkerError("out of memory", "late")

    worker.before = staticmethod(fail)
    (row,) = run("b24", repeats=4, **checkout())
    assert (row.status, row.message.partition(":")[0]) == ("out of memory", "ours")
    assert list(row.seconds) in (["guided-diffusion"], [])


def test_feedback_of_other_widths(run, checkout):
    other = DIFFSSL.replace('from_preset("tiny")', 'from_preset("gd256_uncond")')
    plain, feedback = run("b24", "windowed", **checkout("diffssl", diffssl=other))
    assert (plain.status, feedback.status) == ("ok", "skipped")


def test_interrupted_run_keeps_what_it_has(run, worker, tmp_path):
    before = leftovers()

    def interrupt(who, method):
        if worker.asked.count(("ours", "load")) == 2:
            raise KeyboardInterrupt

    worker.before = staticmethod(interrupt)
    with pytest.raises(SystemExit, match="1 of 3 rows"):
        run("b24", "taps", "windowed")
    content = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [row["case"] for row in content["rows"]] == ["b24"]
    assert content["planned"] == 3
    assert "not finished: 1 of 3 rows" in (tmp_path / "out" / "benchmark.md").read_text()
    assert leftovers() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": (48,)}, r"multiples of 32, got \[48\]"),
        ({"sizes": (0,)}, "multiples of 32"),
        ({"repeats": 0}, "--repeats"),
        ({"unet": "gd257"}, "unknown preset 'gd257'"),
        ({"unet": "gd128", "cases": ("taps",)}, "from 1 to 31"),
        ({"checkpoint": "/nowhere/x.pth"}, "no file /nowhere/x.pth"),
        ({"reference_diffssl": Path("/nowhere")}, "no ssl_diff/__init__.py; git clone"),
        ({"device": "cuda"}, "torch sees no GPU"),
    ],
)
def test_bad_options(run, monkeypatch, tmp_path, options, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "Worker", None)  # before any process is started
    with pytest.raises(UserError, match=words):
        run("b24", **options)
    assert not (tmp_path / "out").exists()


def test_checkpoint_that_does_not_fit(run, tmp_path):
    torch.save(UNet(TINY.replace(model_channels=64)).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="CheckpointError"):
        run("b24", checkpoint=str(tmp_path / "other.pt"))


# --------------------------------------------------------------------------------------------------
# parts


def test_list(checkout, capsys):
    both = {**checkout(), **checkout("diffssl")}
    options = {"unet": "tiny", "sizes": (64, 32, 64), "dtypes": ("float32", "float16")}
    config = BenchmarkConfig(cases=("b24", "taps"), device="cpu", list=True, **options, **both)
    assert timing.run(config) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 2 * 2 * 2 * 2
    assert lines[0] == "b24 32 px x 1 float32 forward eager vs guided-diffusion"
    assert lines[-1] == "taps 64 px x 1 float16 forward eager vs diffssl"


def test_weights_of_a_run(tmp_path):
    Measurements().prepare(TINY, None, tmp_path, ["windowed"])
    weights = torch.load(tmp_path / "weights.pt")
    assert weights.keys() == UNet(TINY).state_dict().keys()
    assert all(weights[key].any() for key in weights if key.endswith("weight"))
    layers = torch.load(tmp_path / "feedback.pt")["windowed"]
    assert list(layers) == [20, 21, 22, 23, 24]
    assert all(layer["1.running_mean"].any() for layer in layers.values())
    given = tmp_path / "given.pth"
    torch.save({"state_dict": {f"module.{k}": v + 1 for k, v in weights.items()}}, given)
    Measurements().prepare(TINY, str(given), tmp_path, [])
    after = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(after[key], weights[key] + 1) for key in weights)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_peak_memory_is_that_of_a_step(run, checkout):
    before = torch.ones(100_000_000 // 4)
    (row,) = run("b24", **checkout(init="torch.ones(60_000_000)", hook="torch.ones(40_000_000)"))
    assert row.peak_bytes["ours"] < 100e6
    assert 155e6 < row.peak_bytes["guided-diffusion"] < 235e6
    del before


@pytest.fixture
def load(tmp_path):
    """Loads ours for a case."""
    Measurements().prepare(TINY, None, tmp_path, ["windowed"])
    case = Case("windowed", 32, 1, "float32", "frozen", "eager", None)

    def start(options=None, **changes):
        ours = Measurements()
        changed = dataclasses.replace(case, **changes)
        config = BenchmarkConfig(**(options or {}))
        ours.load("ours", changed, TINY, tmp_path, "cpu", None, config)
        return ours, ours.model

    return start


def test_what_is_trained(load):
    for mode, trained in (("frozen", False), ("finetuned", True)):
        _, model = load(mode=mode)
        assert model.unet.input_blocks[0][0].weight.requires_grad == trained
        assert not model.unet.training
        assert model.feedback["20"][0].weight.requires_grad
        assert model.feedback["20"][1].training
    (ours, model), maps = load(mode="forward"), []
    ours.step(maps.extend)
    assert not model.feedback["20"][1].training
    assert not maps[0].requires_grad


def test_half_precision_is_stored_where_weights_are_frozen(load):
    for mode, dtype in (("frozen", torch.bfloat16), ("finetuned", torch.float32)):
        ours, model = load(mode=mode, dtype="bfloat16")
        assert model.unet.input_blocks[0][0].weight.dtype == dtype
        assert model.feedback["20"][0].weight.dtype == torch.float32
        ours.step()
        assert model.feedback["20"][0].weight.grad is not None
    (plain, _), maps = load(case="b24", mode="forward", dtype="bfloat16"), []
    plain.step(maps.extend)
    assert torch.equal(maps[0], maps[0].bfloat16())
    assert plain.autocast is None


def test_options_for_ours(load):
    ours, model = load({"channels_last": True, "activation_checkpointing": True})
    assert model.unet.activation_checkpointing
    weight = model.unet.input_blocks[0][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert ours.inputs.is_contiguous(memory_format=torch.channels_last)


def test_compiled(load, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: calls.append(1) or f(x))
    load()[0].step()
    assert calls == []
    ours, _ = load(execution="compiled")
    ours.first()
    assert len(calls) == 2  # the first compiles, the second is measured
    assert ours.flops() > 0
    assert ours.matmul_peak("cpu", "float32", 1e-4) > 0


@pytest.mark.parametrize("compared", [True, False])
def test_table_and_chart(compared):
    case = Case("b24", 32, 1, "float32", "forward", "eager", "diffssl" if compared else None)
    seconds = {"ours": 1.0, "diffssl": 2.0} if compared else {"ours": 1.0}
    good = Row(case, seconds=seconds)
    if compared:
        good.ratio, good.ratio_range = 2.0, (1.5, 2.5)
    bad = Row(case, status="error", message="diffssl: a | b\nc")
    first, second = timing.format_table([good, bad]).splitlines()[-2:]
    assert ("| **2.00** (1.50 to 2.50) | 1 / 2 |" if compared else "| - |  | 1 |") in first
    assert "| **error** |" in second
    assert second.endswith("| diffssl: a \\| b c |")
    (axes,) = timing.chart([good, bad], "a CPU").axes
    assert [bar.get_width() for bar in axes.patches] == [2.0 if compared else 1.0, 0.0]
    entry = json.loads(json.dumps(report.row_entry(bad)))
    assert report.row_from_entry(entry, Row, Case) == bad
