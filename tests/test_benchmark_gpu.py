"""The suite of a GPU, in its CPU form: what it measures, and how it continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffbackbone.benchmark import gpu, references, timing
from diffbackbone.benchmark.config import BenchmarkConfig
from diffbackbone.benchmark.report import Row
from diffbackbone.utils import UserError

WITHOUT_EXTRAS = """
import sys
for name in ("tyro", "matplotlib", "tqdm", "sklearn", "torchvision", "PIL", "mmengine", "mmseg",
             "detectron2", "accelerate", "torchmetrics"):
    sys.modules[name] = None
import in_process, torch
from diffbackbone.benchmark import timing, worker
in_process.use()
worker.MIN_SECONDS = 0
torch.compile = lambda function, **_: function
timing.main(sys.argv[1:])
"""


def test_whole_suite_needs_torch_alone(tmp_path):
    options = ["--suite", "gpu", "--device", "cpu", "--unet", "tiny", "--repeats", "1"]
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *options, "--out", tmp_path]
    folders = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run(command, check=True, env=environment)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    parity = [row for row in rows if row["case"]["reference"] == "cpu"]
    steps = [row for row in rows if row["case"]["name"].startswith(("upernet", "mask_rcnn"))]
    speed = [row for row in rows if row not in parity + steps]
    kinds = {}
    for row in parity:
        dtype, mode = row["case"]["dtype"], row["case"]["mode"]
        kinds[dtype, mode] = kinds.get((dtype, mode), 0) + 1
        if dtype == "float16":
            assert row["status"] == "skipped"
            continue
        assert row["status"] == "ok", row
        assert "seconds" not in row["results"]["ours"]
        assert row["outputs"] < timing.TOLERANCES["outputs"][dtype]
        assert (row["outputs"] > 0) == (dtype == "bfloat16")
        assert (row["gradients"] is not None) == (mode == "finetuned")
    assert kinds == {
        ("bfloat16", "forward"): 4,
        ("float16", "forward"): 4,
        ("float32", "forward"): 4,
        ("float32", "finetuned"): 1,
        ("bfloat16", "finetuned"): 1,
    }
    assert {(row["case"]["size"], row["case"]["batch"]) for row in speed} == {(64, 2), (128, 1)}
    assert {row["case"]["execution"] for row in speed} == {"eager", "compiled"}
    for row in speed:
        if row["case"]["dtype"] != "float16":
            assert row["status"] == "ok", row
            ours = row["results"]["ours"]
            assert min(ours["seconds"]["step"], ours["matmul_peak"], ours["peak_bytes"]) > 0
    assert len(steps) == 8
    assert {(row["status"], row["case"]["mode"]) for row in steps} == {("skipped", "finetuned")}
    assert "mmengine" in steps[0]["message"]
    text = (tmp_path / "gpu.md").read_text()
    assert [text.count(f"\n{count} of {count} rows") for count in (14, 10, 8)] == [1, 1, 1]
    assert "--suite gpu" in text


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Runs a suite whose rows cost 100 s each; returns what was measured."""
    now, measured, statuses = [0.0], [], {}

    def measure(case, config, folder, timeout):
        measured.append(str(case))
        now[0] += 100
        return Row(case, "timeout" if timeout < 100 else statuses.get(str(case), "ok"))

    monkeypatch.setattr(references, "write_weights", lambda *_: None)
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])

    def start(*parts, minutes=8, **options):
        measured.clear()
        config = BenchmarkConfig(out=tmp_path, device="cpu", unet="tiny", **options)
        missing = gpu.run(config, parts or gpu.PARTS, minutes)
        return missing, list(measured)

    start.statuses = statuses
    return start


def test_continues_where_time_was_up(suite, tmp_path):
    missing, first = suite("parity", "steps", minutes=8)  # four rows and one that is too late
    assert missing == {"parity": 10, "speed": 10, "steps": 4}
    assert len(first) == 10
    assert "\n4 of 14 rows" in (tmp_path / "gpu.md").read_text()
    missing, second = suite("parity", minutes=60)
    assert (missing["parity"], len(second)) == (0, 10)
    assert second[0] == first[4]
    assert suite("parity") == (missing, [])
    missing, third = suite("steps", minutes=1)  # even the first row is too late: a result
    assert (missing["steps"], len(third)) == (3, 1)
    missing, fourth = suite("steps", minutes=60)
    assert (missing["steps"], len(fourth)) == (0, 4)
    assert fourth[-1] == third[0]  # tried again after the others
    assert suite("steps", "parity")[1] == []


def test_errors_are_tried_again(suite):
    failed = [f"upernet 64 px x 2 {dtype} finetuned eager" for dtype in ("float32", "bfloat16")]
    suite.statuses.update(zip(failed, ("error", "skipped")))
    suite.statuses["mask_rcnn 64 px x 1 float32 finetuned eager"] = "out of memory"
    suite("steps", minutes=60)
    suite.statuses.clear()
    assert suite("steps", minutes=60)[1] == failed
    assert suite("steps")[1] == []


def test_other_weights_are_no_continuation(suite):
    suite("steps", minutes=60)
    with pytest.raises(UserError, match="weights: 'random', now"):
        suite("steps", checkpoint="w.pt")
