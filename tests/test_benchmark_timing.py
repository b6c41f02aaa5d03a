"""`tools/benchmark.py`: what it compares and reports. No time is ever asserted here.

Small packages stand in for the references. Most rows run in this process, behind the same JSON as
in a worker's; a few start real workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from in_process import InProcess

from diffbackbone.costs import counting_flops
from diffbackbone.unet import UNet, UNetConfig

TOOLS = Path(__file__).resolve().parents[1] / "tools"
TINY = UNetConfig.from_preset("tiny")
FAST = ["--unet", "tiny", "--sizes", "32", "--device", "cpu", "--repeats", "1"]
FAST += ["--warmup", "0", "--min-seconds", "1e-9", "--peak-seconds", "1e-4"]

UNET = """
import torch
from diffbackbone.unet import UNet, UNetConfig
from . import logger
print("a line that is no answer")
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
from diffbackbone.feedback import feedback_map
from diffbackbone.unet import UNetConfig
DM_FEAT_DIM_DICT = {b: i.channels for b, i in UNetConfig.from_preset("tiny").blocks.items()}
class DiffSSLModelFeedbackFusion(nn.Module):
    def __init__(self, encoder, diffusion, head, device, mode, feedback_arch, use_feedback,
                 feedback_b_list, first_fw_b_list, second_fw_b_list):
        super().__init__()
        assert mode in ("freeze", "finetune") and feedback_arch == "C_B_R"
        self.encoder, self.diffusion, self.head = encoder, diffusion, head
        self.device, self.sources = device, feedback_b_list
        self.first, self.second = first_fw_b_list, second_fw_b_list
        self.feedback_b_list = feedback_b_list
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
        with torch.no_grad():
            taps = self.encoder.forward_features(x, steps, self.sources)
        inject = {38 - b: layer(taps[b]) for b, layer in zip(self.sources, self.feedback_layers)}
        maps = self.encoder.forward_features(x, steps, self.second, inject=inject)
        return self.head(self.first, [[]], self.second, [list(maps.values())], t)
"""


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield (
            importlib.import_module("diffbackbone.benchmark.timing"),
            importlib.import_module("diffbackbone.benchmark.references"),
        )


@pytest.fixture
def tool(modules):
    return modules[0]


@pytest.fixture
def worker(modules):
    return modules[1]


@pytest.fixture
def checkout(tmp_path):
    """Writes something like a checkout of a reference."""

    def write(name="guided-diffusion", init="pass", hook="pass"):
        folder = tmp_path / f"a {name}"
        package = folder / "guided_diffusion"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "logger.py").write_text("from mpi4py import MPI\n")
        (package / "nn.py").write_text("from diffbackbone.unet import timestep_embedding\n")
        (package / "unet.py").write_text(UNET.format(init=init, hook=hook))
        if name == "diffssl":
            (folder / "ssl_diff").mkdir()
            (folder / "ssl_diff" / "__init__.py").write_text(DIFFSSL)
        return [f"--reference-{name}", str(folder)]

    return write


@pytest.fixture
def asked(tool, worker, monkeypatch):
    """Runs workers in this process; gives the commands asked for, with who was asked."""
    commands = []
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("allow_tf32", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))

    def forget():
        for name in list(sys.modules):
            if name.split(".")[0] in ("guided_diffusion", "ssl_diff", *worker.STAND_INS):
                monkeypatch.delitem(sys.modules, name)

    class Ours(InProcess):
        def on_ask(self, command):
            if command == "flops":
                raise tool.WorkerError("error", "that takes a second")

        def make(self, args):
            forget()
            return worker.Worker(args.threads, args.cudnn_benchmark)

    Ours.tool, Ours.worker, Ours.commands = tool, worker, commands
    monkeypatch.setattr(tool, "Worker", Ours)
    monkeypatch.setattr(tool, "chart", lambda machine, rows: None)  # takes longer than a row
    yield commands
    forget()


@pytest.fixture
def run(tool, tmp_path):
    """Runs the command line; gives what the JSON file holds."""

    def start(*arguments):
        out = tmp_path / "out"
        tool.main([*FAST, "--out", str(out), *arguments])
        return json.loads((out / "benchmark.json").read_text())

    return start


# --------------------------------------------------------------------------------------------------
# real processes


def flops_of_training(block):
    """Operations for one image to a block and back."""
    with torch.device("meta"), counting_flops() as counter:
        out = UNet(TINY, block).forward_features(torch.empty(1, 3, 32, 32), 90, (block,))[block]
        out.sum().backward()
    return counter.get_total_flops()


def test_a_run_with_processes(run, checkout, tmp_path, capfd):
    leftovers = set(Path(tempfile.gettempdir()).glob("diffbackbone-benchmark-*"))
    options = [
        "--cases",
        "b24",
        "windowed",
        "--modes",
        "finetuned",
        "--threads",
        "1",
        "--repeats",
        "2",
    ]
    content = run(*options, *checkout(init=REENTRANT))
    timed, skipped = content["rows"]
    assert timed["status"] == "ok", timed
    assert timed["difference"] < 1e-4
    assert timed["gradient_difference"] < 1e-3
    rounds = [theirs / ours for ours, theirs in zip(*timed["all_seconds"].values())]
    assert list(timed["all_seconds"]) == ["ours", "guided-diffusion"]
    assert len(rounds) == 2
    assert timed["ratio"] == pytest.approx(statistics.median(rounds))
    assert timed["ratio_range"] == pytest.approx([min(rounds), max(rounds)])
    flops = flops_of_training(24)
    assert timed["flops"]["ours"] == pytest.approx(flops, rel=1e-4)
    assert 1.01 * flops < timed["flops"]["guided-diffusion"] < 1.3 * flops  # it runs a block twice
    for who in ("ours", "guided-diffusion"):
        assert timed["seconds"][who] == pytest.approx(statistics.median(timed["all_seconds"][who]))
        assert 1e6 < timed["peak_bytes"][who] < 500e6
        per_second = timed["flops"][who] / timed["seconds"][who]
        assert timed["flops_per_second"][who] == pytest.approx(per_second)
        peak = content["machine"]["peaks"]["float32"]
        assert timed["matmul_share"][who] == pytest.approx(per_second / peak["matmul"])
        assert timed["convolution_share"][who] == pytest.approx(per_second / peak["convolution"])
    assert (skipped["case"], skipped["status"]) == ("windowed", "skipped")
    assert skipped["message"] == "guided-diffusion has no feedback"
    machine = content["machine"]
    assert machine["torch"] == torch.__version__
    assert (machine["threads"], machine["device"], machine["weights"]) == (1, "cpu", "random")
    assert "--cases b24 windowed" in machine["command"]
    assert machine["cpu"]
    assert machine["date"]
    printed = capfd.readouterr()
    assert "a line that is no answer" not in printed.out
    assert "2/2" in printed.err  # progress
    markdown = (tmp_path / "out" / "benchmark.md").read_text()
    assert markdown in printed.out
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len(rows) == 3
    assert {line.count(" | ") for line in rows} == {15}
    assert rows[1].startswith("| b24 | 32 | 1 | float32 | finetuned | eager | guided-diffusion | *")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "benchmark.json", "benchmark.md", "benchmark.png",
    ]  # fmt: skip
    assert set(Path(tempfile.gettempdir()).glob("diffbackbone-benchmark-*")) == leftovers


SCRIPT = """
import json, os, signal, sys, time
settings = sys.stdin.readline()
for line in sys.stdin:
    command = json.loads(line)["command"]
    if command == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if command == "slow": time.sleep(60)
    if command == "dies": sys.exit("the last line of the log")
    answer = {"result": [settings, os.environ.get("OMP_NUM_THREADS")]}
    if command == "fails": answer = {"error": "skipped", "message": "it can't"}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def process(tool, tmp_path, monkeypatch):
    """A real process without torch in it."""
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(tool.Worker, "script", script)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    args = argparse.Namespace(threads=3, cudnn_benchmark=True, timeout=20)
    started = tool.Worker(args, tmp_path / "log")
    yield started
    started.close()
    assert started.process.returncode is not None


def test_threads_reach_the_process(process):
    settings, threads = process.ask("anything")
    assert json.loads(settings) == {"threads": 3, "cudnn_benchmark": True}
    assert threads == "3"


def test_an_error_of_a_process_is_an_error_here(tool, process):
    with pytest.raises(tool.WorkerError, match="^it can't$") as caught:
        process.ask("fails")
    assert caught.value.kind == "skipped"
    assert process.ask("anything")  # it goes on


@pytest.mark.parametrize(
    ("command", "kind", "words"),
    [
        ("killed", "out of memory", "killed .signal 9.*'killed'"),
        ("dies", "error", "exit code 1.*'dies': the last line of the log"),
        ("slow", "error", "slow took more than 0.5 s"),
    ],
)
def test_a_process_that_ends(tool, process, command, kind, words):
    process.ask("anything")
    process.timeout = 0.5 if command == "slow" else process.timeout
    with pytest.raises(tool.WorkerError, match=words) as caught:
        process.ask(command)
    assert caught.value.kind == kind
    with pytest.raises(tool.WorkerError, match="ended|killed"):
        process.ask("anything")


# --------------------------------------------------------------------------------------------------
# comparing


def test_all_cases_against_diffssl(asked, run, checkout, tool, monkeypatch):
    def only_some(self, command):
        if command == "flops" and asked.count(("ours", "load")) != 4:
            raise tool.WorkerError("error", "that takes a second")

    monkeypatch.setattr(tool.Worker, "on_ask", only_some)
    rows = run("--batch", "2", *checkout("diffssl"))["rows"]
    assert [row["case"] for row in rows] == list(tool.CASES)
    for row in rows:
        assert row["status"] == "ok", row
        assert row["difference"] < 1e-4
        assert row["gradient_difference"] is None
        assert row["ratio"] > 0
    *others, windowed = (row["flops"] for row in rows)
    assert others == [{}] * 3
    assert windowed["ours"] < 0.95 * windowed["diffssl"]  # the first blocks run once


def test_training_against_diffssl(asked, run, checkout):
    options = ["--modes", "frozen", "finetuned", "--sizes", "64", "--cases", "windowed"]
    rows = run(*options, *checkout("diffssl"))["rows"]
    assert [row["status"] for row in rows] == ["ok"] * 2, rows
    assert max(row["difference"] for row in rows) < 1e-4
    assert all(0 <= row["gradient_difference"] < 1e-2 for row in rows)


def test_half_precision(asked, run, checkout):
    content = run("--dtypes", "bfloat16", "float16", "--cases", "b24", *checkout())
    row, skipped = content["rows"]
    assert row["status"] == "ok", row
    assert row["dtypes"] == {"ours": "bfloat16", "guided-diffusion": "bfloat16 (autocast)"}
    assert row["difference"] < 0.1
    assert list(content["machine"]["peaks"]) == ["bfloat16"]
    assert skipped["status"] == "skipped"
    assert "float16 is for GPUs" in skipped["message"]


def test_they_take_turns(asked, run, checkout):
    run("--cases", "b24", "--repeats", "3", "--warmup", "2", *checkout())
    timed = [who for who, command in asked if command == "time"]
    ours, theirs = "ours", "guided-diffusion"
    assert timed == [ours] * 2 + [theirs] * 2 + [ours, theirs, theirs, ours, ours, theirs]
    assert [command for who, command in asked if who == ours][:2] == ["load", "first"]
    assert asked.index((theirs, "first")) < asked.index((ours, "time"))


def test_outputs_that_differ_are_wrong_and_not_timed(asked, run, checkout):
    wrong = checkout(hook="x = x + 0.1")
    (row,) = run("--cases", "b24", *wrong)["rows"]
    assert row["status"] == "wrong"
    assert row["difference"] > 1e-4
    assert "outputs differ by" in row["message"]
    assert row["ratio"] is None
    assert row["seconds"] == {}
    assert set(row["peak_bytes"]) == {"ours", "guided-diffusion"}
    assert not [command for _, command in asked if command == "time"]


def test_gradients_that_differ_are_wrong(asked, run, checkout):
    init = "self.input_blocks[0].register_forward_hook(lambda m, i, x: 2 * x - x.detach())"
    (row,) = run("--cases", "b24", "--modes", "finetuned", *checkout(init=init))["rows"]
    assert row["difference"] < 1e-4
    assert row["status"] == "wrong"
    assert "gradients differ by" in row["message"]


@pytest.mark.parametrize(
    ("theirs", "status", "words"),
    [
        ([[1.0, 1.0 + 2e-4]], "wrong", "outputs differ by 2.0e-04"),
        ([[1.0, 1.0 + 5e-5]], "ok", ""),
        ([[1.0, float("nan")]], "wrong", "outputs differ by nan"),
        ([[1.0, 1.0, 1.0]], "wrong", r"outputs of shapes \[\(2,\)\] and \[\(3,\)\]"),
        ([[1.0, 1.0], [1.0, 1.0]], "wrong", "outputs of shapes"),
    ],
)
def test_comparison(tool, tmp_path, theirs, status, words):
    for who, maps in (("ours", [[1.0, 1.0]]), ("diffssl", theirs)):
        torch.save([torch.tensor(x) for x in maps], tmp_path / f"{who}.outputs.pt")
        torch.save({}, tmp_path / f"{who}.gradients.pt")
    row = tool.Row(tool.Case("b24", 32, 1, "float32", "forward", "eager", "diffssl"))
    tool.compare(row, tmp_path)
    assert row.status == status
    assert re.search(words, row.message)


# --------------------------------------------------------------------------------------------------
# what goes wrong


@pytest.mark.parametrize(
    ("hook", "status", "words"),
    [
        ("raise KeyError('their bug')", "error", "guided-diffusion: KeyError: 'their bug'"),
        ("raise MemoryError", "out of memory", "guided-diffusion: MemoryError"),
    ],
)
def test_a_reference_that_fails(asked, run, checkout, hook, status, words):
    cases = ["b24", "taps"] if status == "error" else ["b24"]
    rows = run("--cases", *cases, *checkout(hook=hook))["rows"]
    assert [row["case"] for row in rows] == cases  # the rest goes on
    for row in rows:
        assert row["status"] == status
        assert row["message"].startswith(words)
        assert list(row["seconds"]) == ["ours"]  # which goes on too
        assert row["ratio"] is None
        assert row["flops"] == {}


def test_how_torch_says_that_memory_ran_out(worker):
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    assert worker.out_of_memory(cpu)
    assert worker.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not worker.out_of_memory(RuntimeError("shape mismatch"))
    assert not worker.out_of_memory(ValueError("can't allocate memory"))


def test_a_failure_while_it_is_timed(asked, run, checkout, tool, monkeypatch):
    def fail(self, command):
        if command == "flops" or (self.who == "ours" and asked.count(("ours", "time")) == 3):
            raise tool.WorkerError("out of memory", "late")

    monkeypatch.setattr(tool.Worker, "on_ask", fail)
    (row,) = run("--cases", "b24", "--repeats", "4", *checkout())["rows"]
    assert (row["status"], row["message"]) == ("out of memory", "ours: late")
    assert list(row["seconds"]) == ["guided-diffusion"]
    assert len(row["all_seconds"]["guided-diffusion"]) == 4


def test_feedback_of_other_widths(asked, run, checkout):
    options = checkout("diffssl")
    package = Path(options[1]) / "ssl_diff" / "__init__.py"
    package.write_text(DIFFSSL.replace('from_preset("tiny")', 'from_preset("gd256_uncond")'))
    plain, feedback = run("--cases", "b24", "windowed", *options)["rows"]
    assert plain["status"] == "ok"
    assert feedback["status"] == "skipped"
    assert "diffssl's feedback has the channels of the 256-px models" in feedback["message"]


def test_an_interrupted_run_keeps_what_it_has(asked, run, tool, tmp_path, monkeypatch, capsys):
    leftovers = set(Path(tempfile.gettempdir()).glob("diffbackbone-benchmark-*"))
    found = []

    def interrupt(self, command):
        if command == "flops":
            raise tool.WorkerError("error", "that takes a second")
        if asked.count(("ours", "load")) == 2:
            found.append(json.loads((tmp_path / "out" / "benchmark.json").read_text()))
            raise KeyboardInterrupt

    monkeypatch.setattr(tool.Worker, "on_ask", interrupt)
    with pytest.raises(SystemExit) as caught:
        run("--cases", "b24", "taps", "windowed")
    assert caught.value.code == 130
    (content,) = found
    assert [row["case"] for row in content["rows"]] == ["b24"]
    assert content["planned"] == 3
    assert "holds 1 of 3 rows" in capsys.readouterr().err
    assert "not finished: 1 of 3 rows" in (tmp_path / "out" / "benchmark.md").read_text()
    assert set(Path(tempfile.gettempdir()).glob("diffbackbone-benchmark-*")) == leftovers


def test_a_report_that_fails_leaves_the_last_one(tool, tmp_path, monkeypatch):
    machine = {"cpu": "a", "peaks": {}}
    case = tool.Case("b24", 32, 1, "float32", "forward", "eager", None)
    tool.write_reports(tmp_path, machine, [tool.Row(case)], 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tool.write_reports(tmp_path, machine, [tool.Row(case)] * 2, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cases", "b25"], "invalid choice: 'b25'"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--modes", "backward"], "invalid choice: 'backward'"),
        (["--sizes", "0"], "invalid positive number value: '0'"),
        (["--sizes", "48"], r"--sizes must be multiples of 32, got \[48\]"),
        (["--repeats", "0"], "invalid positive number value: '0'"),
        (["--warmup", "-1"], "--warmup can't be negative, got -1"),
        (["--timeout", "0"], "--timeout must be positive, got 0.0"),
        (["--min-seconds", "nan"], "--min-seconds must be positive, got nan"),
        (["--unet", "gd257"], "unknown preset 'gd257'; choose from gd64"),
        (["--unet", "gd128"], "the blocks of the case taps must be block numbers from 1 to 31"),
        (["--checkpoint", "/nowhere/x.pth"], "there is no checkpoint '/nowhere/x.pth'"),
        (["--reference-diffssl", "/nowhere"], "--reference-diffssl /nowhere: there is no guided_"),
        (["--device", "cuda"], "torch sees no GPU"),
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


def test_a_checkout_of_the_wrong_reference(tool, checkout, capsys):
    folder = checkout()[1]
    with pytest.raises(SystemExit):
        tool.parse(["--reference-diffssl", folder])
    assert "there is no ssl_diff/__init__.py" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit(asked, run, tmp_path):
    torch.save(UNet(TINY.replace(model_channels=64)).state_dict(), tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="error: CheckpointError.*of another architecture"):
        run("--checkpoint", str(tmp_path / "other.pt"))


# --------------------------------------------------------------------------------------------------
# parts


def test_rows(tool, capsys, checkout):
    both = checkout() + checkout("diffssl")
    sizes = ["--sizes", "64", "32", "64", "--dtypes", "float32", "float16"]
    tool.main([*FAST, *sizes, "--cases", "b24", "taps", "--list", *both])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 2 * 2 * 2 * 2
    assert lines[0] == "b24 32 px x 1 float32 forward eager vs guided-diffusion"
    assert lines[-1] == "taps 64 px x 1 float16 forward eager vs diffssl"
    tool.main([*FAST, "--cases", "b24", "--list"])
    assert capsys.readouterr().out == "b24 32 px x 1 float32 forward eager\n"


def test_weights_of_a_run(worker, tmp_path):
    files = {name: str(tmp_path / name) for name in ("weights", "feedback_weights")}
    config = dataclasses.asdict(TINY)
    worker.prepare(config=config, checkpoint=None, feedback=["windowed"], **files)
    weights = torch.load(files["weights"])
    assert weights.keys() == UNet(TINY).state_dict().keys()
    assert all(weights[key].any() for key in weights if key.endswith("weight"))
    layers = torch.load(files["feedback_weights"])["windowed"]
    assert list(layers) == ["20", "21", "22", "23", "24"]
    assert all(layer["1.running_mean"].any() for layer in layers.values())
    given = str(tmp_path / "given.pt")
    torch.save({"state_dict": {f"module.{k}": v + 1 for k, v in weights.items()}}, given)
    worker.prepare(config=config, checkpoint=given, feedback=[], **files)
    after = torch.load(files["weights"])
    assert all(torch.equal(after[key], weights[key] + 1) for key in weights)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be begun anew on Linux only")
def test_peak_memory_is_that_of_a_step(asked, run, checkout):
    """Of the step and the weights: neither of loading nor of what was there before."""
    before = torch.ones(100_000_000 // 4)
    options = checkout(init="torch.ones(60_000_000)", hook="torch.ones(40_000_000)")
    (row,) = run("--cases", "b24", *options)["rows"]
    assert row["status"] == "ok"
    assert row["peak_bytes"]["ours"] < 100e6
    assert 155e6 < row["peak_bytes"]["guided-diffusion"] < 235e6
    del before


@pytest.fixture
def job(worker, tmp_path):
    """A case for :meth:`Worker.load`."""
    files = {name: str(tmp_path / name) for name in ("weights", "feedback_weights")}
    config = dataclasses.asdict(TINY)
    worker.prepare(config=config, checkpoint=None, feedback=["windowed"], **files)
    return {
        "implementation": "ours", "config": config, **files, "blocks": [24],
        "feedback": "windowed", "t": 90, "size": 32, "batch": 1, "dtype": "float32",
        "mode": "frozen", "compiled": False, "device": "cpu", "channels_last": False,
        "activation_checkpointing": False, "checkout": None,
    }  # fmt: skip


def test_what_is_trained(worker, job):
    for mode, trained in (("frozen", False), ("finetuned", True)):
        model = worker.Ours({**job, "mode": mode}).model
        assert model.unet.input_blocks[0][0].weight.requires_grad == trained
        assert not model.unet.training
        assert model.feedback["20"][0].weight.requires_grad
        assert model.feedback["20"][1].training
    ours, maps = worker.Ours({**job, "mode": "forward"}), []
    ours.step(maps.extend)
    assert not ours.model.feedback["20"][1].training
    assert not maps[0].requires_grad


def test_half_precision_is_stored_where_weights_are_frozen(worker, job):
    for mode, dtype in (("frozen", torch.bfloat16), ("finetuned", torch.float32)):
        ours = worker.Ours({**job, "mode": mode, "dtype": "bfloat16"})
        assert ours.model.unet.input_blocks[0][0].weight.dtype == dtype
        assert ours.model.feedback["20"][0].weight.dtype == torch.float32
        ours.step()
        assert ours.model.feedback["20"][0].weight.grad is not None
    plain = worker.Ours({**job, "mode": "forward", "dtype": "bfloat16", "feedback": None})
    maps = []
    plain.step(maps.extend)
    assert torch.equal(maps[0], maps[0].bfloat16())  # whatever type it is handed out in
    assert plain.autocast is None


def test_options_for_ours(worker, job):
    options = {"channels_last": True, "activation_checkpointing": True}
    ours = worker.Ours({**job, **options})
    assert ours.model.unet.activation_checkpointing
    weight = ours.model.unet.input_blocks[0][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert ours.inputs.is_contiguous(memory_format=torch.channels_last)


def test_compiled(worker, job, monkeypatch):
    compiled, calls = [], []

    def compile_(function, **_):
        compiled.append(function.__name__)
        return lambda x: calls.append(1) or function(x)

    monkeypatch.setattr(torch, "compile", compile_)
    worker.Ours(job).step()
    assert (compiled, calls) == ([], [])
    ours = worker.Worker(None, False)
    ours.load({**job, "compiled": True})
    assert compiled == ["features"]
    files = {kind: f"{job['weights']}.{kind}" for kind in ("outputs", "gradients")}
    ours.first(**files)
    assert len(calls) == 2  # the first compiles, the second is measured
    assert ours.flops() > 0
    assert len(calls) == 2


def test_peaks(worker):
    found = worker.peaks("cpu", "float32", 1e-4)
    assert set(found) == {"matmul", "convolution"}
    assert min(found.values()) > 0


def make_rows(tool):
    case = tool.Case("b24", 32, 1, "float32", "forward", "eager", "diffssl")
    good = tool.Row(case, ratio=2.0, ratio_range=(1.5, 2.5), seconds={"ours": 1.0, "diffssl": 2.0})
    bad = tool.Row(case, status="error", message="diffssl: a | b\nc")
    return [good, bad]


def test_table(tool):
    text = tool.format_markdown({"cpu": "x", "peaks": {"float32": {"matmul": 2e12}}},
                                make_rows(tool), 2)  # fmt: skip
    assert "* peak in float32: matmul 2 TFLOP/s" in text
    assert "not finished" not in text
    good, bad = [line for line in text.splitlines() if line.startswith("| b24")]
    assert "| **2.00** (1.50 to 2.50) | 1 / 2 |" in good
    assert "| **error** |" in bad
    assert bad.endswith("| diffssl: a \\| b c |")


@pytest.mark.parametrize("missing", [(), ("matplotlib",), ("matplotlib", "PIL")])
@pytest.mark.parametrize("compared", [True, False])
def test_chart(tool, monkeypatch, missing, compared):
    for name in ("matplotlib", "PIL"):
        if name not in missing:
            pytest.importorskip(name)
    rows = make_rows(tool)
    if not compared:
        case = dataclasses.replace(rows[0].case, reference=None)
        rows = [tool.Row(case, seconds={"ours": 1.0}), tool.Row(case, status="skipped")]
    for name in missing:
        for known in [key for key in sys.modules if key.split(".")[0] == name]:
            monkeypatch.setitem(sys.modules, known, None)
        monkeypatch.setitem(sys.modules, name, None)
    picture = tool.chart({"cpu": "x"}, rows)
    if "PIL" in missing:
        assert picture is None
        return
    assert min(picture.size) > 50
    blue = [tuple(pixel) == (59, 111, 182) for pixel in picture.convert("RGB").getdata()]
    assert sum(blue) > 100  # one bar: the other row has none
