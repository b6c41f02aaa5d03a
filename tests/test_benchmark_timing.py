"""The backbone beside published code: what is compared and reported. No time is asserted.

Small packages stand in for the references.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import in_process
import pytest
import torch

from diffbackbone import UNet, UNetConfig
from diffbackbone.benchmark import references, report, timing, worker
from diffbackbone.benchmark.config import PASSES, BenchmarkConfig, Case
from diffbackbone.benchmark.references import Pass, write_weights
from diffbackbone.benchmark.report import Row
from diffbackbone.benchmark.worker import Worker, WorkerError
from diffbackbone.costs import counting_flops
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


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights for all cases."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(BenchmarkConfig(unet="tiny"), folder)
    return folder


@pytest.fixture
def workers(monkeypatch, weights):
    """Runs workers in this process, and short steps once."""
    kind = in_process.use(monkeypatch.setattr)

    def copy_weights(config, folder):
        if config.checkpoint:
            write_weights(config, folder)
        for path in weights.glob("*.pt"):
            shutil.copy(path, folder)

    monkeypatch.setattr(references, "write_weights", copy_weights)
    monkeypatch.setattr(worker, "MIN_SECONDS", 0)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def forget(who=None, method="load"):
        if method == "load":
            for name in list(sys.modules):
                if name.split(".")[0] in ("guided_diffusion", "ssl_diff", *references.STAND_INS):
                    monkeypatch.delitem(sys.modules, name)

    kind.before = staticmethod(forget)
    yield kind
    forget()


@pytest.fixture
def run(workers, tmp_path):
    def start(*cases, **options):
        fast = {"unet": "tiny", "sizes": (32,), "device": "cpu", "repeats": 1}
        config = BenchmarkConfig(**{**fast, "cases": cases, **options})
        return list(timing.run(config, tmp_path / "out", {"rows": config.plan()}).values())

    return start


# --------------------------------------------------------------------------------------------------
# processes


def test_command_with_processes(checkout, tmp_path):
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    (folder,) = checkout(init=REENTRANT).values()
    options = shlex.split(
        "--unet tiny --sizes 32 --device cpu --repeats 2 --cases b24 --modes finetuned"
    )
    paths = ["--reference-guided-diffusion", folder, "--out", out]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, *paths],
        capture_output=True, text=True, check=True, env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    content = json.loads((out / "benchmark.json").read_text())
    (row,) = content["rows"]
    assert row["status"] == "ok", row["message"]
    assert row["outputs"] < 1e-4
    assert row["gradients"] < 1e-3
    results = list(row["results"].values())
    assert list(row["results"]) == ["ours", "guided-diffusion"]
    ours, theirs = ([seconds["step"] for seconds in result["rounds"]] for result in results)
    ratios = [b / a for a, b in zip(ours, theirs)]
    assert len(ratios) == 2
    assert row["ratio"] == pytest.approx(statistics.median(ratios))
    assert row["range"] == pytest.approx([min(ratios), max(ratios)])
    with counting_flops() as counter:
        UNet(TINY, 24).forward_features(torch.zeros(1, 3, 32, 32), 90, (24,))[24].sum().backward()
    flops = counter.get_total_flops()
    assert results[0]["flops"] == pytest.approx(flops, rel=1e-4)
    assert 1.01 * flops < results[1]["flops"] < 1.3 * flops  # runs a block twice
    for result, seconds in zip(results, (ours, theirs)):
        assert result["seconds"]["step"] == pytest.approx(statistics.median(seconds))
        assert 1e6 < result["peak_bytes"] < 500e6
    text = (out / "benchmark.md").read_text()
    assert "1 of 1 rows" in text
    assert "--cases b24" in text
    assert text.splitlines()[-1] in done.stdout
    assert list(temporary.glob("diffbackbone-*")) == []


class Target:
    """What a real worker holds."""

    def fail(self, error):
        raise error

    def be_killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def exit(self):
        sys.exit("the last line of the log")

    def sleep(self):
        time.sleep(60)


@pytest.mark.parametrize(
    ("method", "kind", "words"),
    [
        ("be_killed", "out of memory", "who: be_killed"),
        ("exit", "error", "exit code 1: the last line of the log"),
        ("sleep", "timeout", "who: sleep: too slow"),
    ],
)
def test_process_that_ends(tmp_path, method, kind, words):
    with Worker("who", tmp_path / "log", 60, Target) as started:
        with pytest.raises(WorkerError, match="who: fail: KeyError: 'a bug'"):
            started.ask("fail", KeyError("a bug"))
        if method == "sleep":
            started.deadline = time.monotonic() + 0.5
        with pytest.raises(WorkerError, match=words) as caught:
            started.ask(method)
    assert caught.value.kind == kind
    assert not started.process.is_alive()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("shape mismatch"), "error"),
        (ValueError("can't allocate memory"), "error"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (ImportError("no such package"), "skipped"),
    ],
)
def test_kinds_of_errors(error, kind):
    assert worker.call(Target(), "fail", (error,))[0] == kind


def test_memory_that_a_cpu_lacks():
    assert worker.call(torch, "empty", (1 << 60,))[0] == "out of memory"


# --------------------------------------------------------------------------------------------------
# comparing


def test_all_cases_against_diffssl(run, checkout):
    # at 32 px, groups of the norm at the bottleneck have one value, less its mean: rounding alone
    rows = run(*PASSES, batch=2, sizes=(64,), **checkout("diffssl"))
    assert [row.case.name for row in rows] == list(PASSES)
    for row in rows:
        assert (row.status, row.message) == ("ok", "")
        assert row.outputs < 1e-4
        assert row.gradients is None
        assert row.ratio > 0
    ours, theirs = (result["flops"] for result in rows[-1].results.values())
    assert ours < 0.95 * theirs  # the first blocks run once


def test_training_against_diffssl(run, checkout):
    rows = run("windowed", modes=("frozen", "finetuned"), sizes=(64,), **checkout("diffssl"))
    assert [row.status for row in rows] == ["ok"] * 2, rows
    assert max(row.outputs for row in rows) < 1e-4
    assert all(0 <= row.gradients < 1e-2 for row in rows)


def test_half_precision_and_turns(run, checkout, workers):
    row, skipped = run("b24", dtypes=("bfloat16", "float16"), repeats=3, **checkout())
    assert row.status == "ok", row
    dtypes = {who: result["dtype"] for who, result in row.results.items()}
    assert dtypes == {"ours": "bfloat16", "guided-diffusion": "bfloat16 (autocast)"}
    assert 1e-4 < row.outputs < 0.1
    assert skipped.status == "skipped"
    ours, theirs = "ours", "guided-diffusion"
    timed = [who for who, method in workers.asked if method == "time"]
    assert timed == [ours, theirs, theirs, ours, ours, theirs]
    assert workers.asked.index((theirs, "load")) < workers.asked.index((ours, "time"))


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
def test_what_differs_is_wrong_and_not_timed(run, checkout, workers, options, mode, words):
    (row,) = run("b24", modes=(mode,), **checkout(**options))
    assert row.status == "wrong"
    assert row.message.startswith(words)
    assert (row.outputs > 1e-4) == (words == "outputs")
    assert row.ratio is None
    assert "time" not in [method for _, method in workers.asked]


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
        outputs = [torch.tensor(x) for x in maps]
        torch.save({"outputs": outputs, "gradients": {}}, tmp_path / f"{who}.pt")
    row = Row(Case("b24", 32, 1, "float32", "forward", "eager", "diffssl"))
    timing.compare(row, tmp_path)
    assert row.status == status


# --------------------------------------------------------------------------------------------------
# errors


def test_reference_that_fails(run, checkout, tmp_path):
    rows = run("b24", "taps", **checkout(hook="raise KeyError('their bug')"))
    assert [row.case.name for row in rows] == ["b24", "taps"]
    for row in rows:
        assert (row.status, row.ratio) == ("error", None)
        assert row.message.startswith("guided-diffusion: ")
        assert row.results["ours"]["seconds"]["step"] > 0  # is still timed
    assert "| error |" in (tmp_path / "out.md").read_text()


def test_failure_while_timed(run, checkout, workers):
    load = workers.before

    def fail(who, method):
        load(who, method)
        if workers.asked.count(("ours", "time")) == 3:
            raise WorkerError("out of memory", "late")

    workers.before = staticmethod(fail)
    (row,) = run("b24", repeats=4, **checkout())
    assert (row.status, row.message, row.ratio) == ("out of memory", "late", None)


def test_feedback_of_other_widths(run, checkout):
    other = DIFFSSL.replace('from_preset("tiny")', 'from_preset("gd256_uncond")')
    (row,) = run("windowed", **checkout("diffssl", diffssl=other))
    assert row.status == "skipped"


def test_interrupted_run_keeps_what_it_has(run, workers, tmp_path):
    def interrupt(who, method):
        if workers.asked.count(("ours", "load")) == 2:
            raise KeyboardInterrupt

    workers.before = staticmethod(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("b24", "taps")
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["case"]["name"] == "b24"
    assert "1 of 2 rows" in (tmp_path / "out.md").read_text()


def test_files_that_are_wrong(run, tmp_path):
    with pytest.raises(ValueError, match="unknown preset 'gd257'"):
        run("b24", unet="gd257")
    with pytest.raises(UserError, match=r"no ssl_diff/__init__.py; git clone"):
        run("b24", reference_diffssl=tmp_path)
    torch.save(UNet(TINY.replace(model_channels=64)).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="another architecture"):
        run("b24", checkpoint=str(tmp_path / "other.pt"))


# --------------------------------------------------------------------------------------------------
# parts


def test_plan(checkout):
    both = {**checkout(), **checkout("diffssl")}
    plan = BenchmarkConfig(
        cases=("b24", "windowed", "upernet"), sizes=(64, 32, 64), dtypes=("float32", "float16"),
        modes=("forward", "frozen"), device="cpu", **both,
    ).plan()  # fmt: skip
    assert len(plan) == len(set(plan)) == 2 * 2 * 2 * (2 + 1) + 2 * 2
    assert str(plan[0]) == "b24 32 px x 1 float32 forward eager vs guided-diffusion"
    assert str(plan[-1]) == "upernet 64 px x 2 float16 frozen eager"
    windowed = {case.reference for case in plan if case.name == "windowed"}
    assert windowed == {"diffssl"}  # guided-diffusion has no feedback
    defaults = BenchmarkConfig(cases=("b24", "upernet", "mask_rcnn_difffeed")).plan()
    assert [(case.size, case.batch, case.mode) for case in defaults] == [
        (256, 1, "forward"),
        *((512, 2, mode) for mode in ("frozen", "finetuned")),
        *((1024, 1, mode) for mode in ("frozen", "finetuned")),
    ]


def test_weights_of_a_run(tmp_path):
    write_weights(BenchmarkConfig(cases=("windowed",), unet="tiny"), tmp_path)
    weights = torch.load(tmp_path / "weights.pt")
    assert weights.keys() == UNet(TINY).state_dict().keys()
    assert all(weights[key].any() for key in weights if key.endswith("weight"))
    layers = torch.load(tmp_path / "windowed.pt")
    assert list(layers) == [20, 21, 22, 23, 24]
    assert all(layer["1.running_mean"].any() for layer in layers.values())
    given = tmp_path / "given.pth"
    torch.save({"state_dict": {f"module.{k}": v + 1 for k, v in weights.items()}}, given)
    write_weights(BenchmarkConfig(unet="tiny", checkpoint=str(given)), tmp_path)
    after = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(after[key], weights[key] + 1) for key in weights)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_peak_memory_is_that_of_timed_steps(run, checkout):
    held = torch.ones(100_000_000 // 4)
    (ours,) = run("b24")
    hook = "torch.ones(40_000_000 if 'ran' in vars(self) else 90_000_000); self.ran = True"
    (row,) = run("b24", **checkout(init="self.kept = torch.ones(60_000_000)", hook=hook))
    assert ours.results["ours"]["peak_bytes"] < 100e6
    assert 395e6 < row.results["guided-diffusion"]["peak_bytes"] < 500e6
    del held


@pytest.fixture
def load(weights):
    """Builds ours for a case."""
    config = {"device": "cpu", "unet": "tiny"}

    def start(name="windowed", dtype="float32", mode="frozen", execution="eager", **options):
        case = Case(name, 32, 1, dtype, mode, execution)
        return Pass("ours", case, BenchmarkConfig(**config, **options), weights)

    return start


def test_what_is_trained(load):
    for mode, trained in (("frozen", False), ("finetuned", True)):
        model = load(mode=mode).model
        assert model.unet.input_blocks[0][0].weight.requires_grad == trained
        assert not model.unet.training
        assert model.feedback["20"][0].weight.requires_grad
        assert model.feedback["20"][1].training
    assert not load(mode="forward").model.feedback["20"][1].training
    assert load(activation_checkpointing=True).model.unet.activation_checkpointing


def test_half_precision_is_stored_where_weights_are_frozen(load, weights):
    for mode, dtype in (("frozen", torch.bfloat16), ("finetuned", torch.float32)):
        ours = load(mode=mode, dtype="bfloat16")
        assert ours.model.unet.input_blocks[0][0].weight.dtype == dtype
        assert ours.model.feedback["20"][0].weight.dtype == torch.float32
        ours.first()
        assert "20" in torch.load(weights / "ours.pt")["gradients"]
    plain = load(name="b24", mode="forward", dtype="bfloat16")
    plain.first()
    (output,) = torch.load(weights / "ours.pt")["outputs"]
    assert torch.equal(output, output.bfloat16())
    assert plain.autocast is None


def test_compiled(load, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: calls.append(1) or f(x))
    load().step()
    assert calls == []
    ours = load(execution="compiled")
    assert ours.first() > 0
    assert len(calls) == 1
    ours.step()
    assert len(calls) == 2


@pytest.mark.parametrize("compared", [True, False])
def test_table(compared):
    case = Case("b24", 32, 1, "float32", "forward", "eager", "diffssl" if compared else None)
    good, seconds = Row(case), {"ours": 1.0}
    if compared:
        seconds["diffssl"], good.ratio, good.range = 2.0, 2.0, (1.5, 2.5)
    for who, value in seconds.items():
        good.results[who] = {"seconds": {"step": value}, "flops": 1e12, "matmul_peak": 2e12}
    bad = Row(case, status="error", message="diffssl: a | b\nc")
    head, _, first, second = report.format_table([good, bad]).splitlines()
    assert ("ratio" in head) == compared
    assert "memory" not in head  # of no row
    assert ("| **2.00** (1.50 to 2.50) | 1 / 2 |" if compared else "| ok | 1 |") in first
    assert ("| 50% / 25% |" if compared else "| 50% |") in first
    assert second.endswith("| diffssl: a \\| b c |")
