"""The suite of a GPU, in its CPU form: what it measures, and how it continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffbackbone.benchmark import gpu, steps, timing
from diffbackbone.benchmark.gpu import SuiteConfig
from diffbackbone.utils import UserError

WITHOUT_EXTRAS = """
import sys, types
for name in ("tyro", "matplotlib", "tqdm", "sklearn", "torchvision", "PIL", "mmengine", "mmseg",
             "detectron2", "accelerate", "torchmetrics"):
    sys.modules[name] = None
import in_process, torch
from diffbackbone.benchmark import steps, timing
in_process.use(types.SimpleNamespace(setattr=setattr), timing, steps)
torch.compile = lambda function, **_: function
timing.main(sys.argv[1:])
"""


def test_whole_suite_needs_torch_alone(tmp_path):
    options = ["--suite", "gpu", "--device", "cpu", "--unet", "tiny", "--repeats", "1"]
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *options, "--out", tmp_path]
    folders = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run(command, check=True, env=environment)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    kinds = {}
    for row in parts["parity"]:
        kinds.setdefault((row["dtype"], row["mode"]), []).append(row)
        assert row["seconds"] == {}
        if row["dtype"] == "float16":
            assert row["status"] == "skipped"
            continue
        assert row["status"] == "ok", row
        assert row["difference"] < timing.TOLERANCE[row["dtype"]]
        assert (row["difference"] > 0) == (row["dtype"] == "bfloat16")
        assert (row["gradient_difference"] is not None) == (row["mode"] == "finetuned")
    assert {kind: len(rows) for kind, rows in kinds.items()} == {
        ("bfloat16", "forward"): 4,
        ("float16", "forward"): 4,
        ("float32", "forward"): 4,
        ("float32", "finetuned"): 1,
        ("bfloat16", "finetuned"): 1,
    }
    assert {(row["size"], row["batch"]) for row in parts["speed"]} == {(64, 2), (128, 1)}
    assert {row["execution"] for row in parts["speed"]} == {"eager", "compiled"}
    for row in parts["speed"]:
        if row["dtype"] != "float16":
            assert row["status"] == "ok", row
            assert row["seconds"]["ours"] > 0
            assert row["matmul_share"]["ours"] > 0
            assert row["peak_bytes"]["ours"] > 0
    assert {row["model"] for row in parts["steps"]} == {"upernet", "mask_rcnn"}
    assert {(row["status"], row["mode"]) for row in parts["steps"]} == {("skipped", "finetuned")}
    assert "mmseg" in parts["steps"][0]["message"]
    text = (tmp_path / "gpu.md").read_text()
    assert "not finished" not in text
    assert text.count("\n|---") == 3
    assert "--suite gpu" in text


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Runs a suite whose rows cost 100 s each; returns what was measured."""
    now, measured, statuses = [0.0], [], {}

    def measure(kind):
        def run(*arguments):
            (case,) = (x for x in arguments if hasattr(x, "dtype") and hasattr(x, "mode"))
            measured.append(str(case))
            now[0] += 100
            late = arguments[-1] < 100
            return kind(case, status="timeout" if late else statuses.get(str(case), "ok"))

        return run

    def prepare(self):
        self.peaks["float32"] = 1e9
        return {"cpu": "a", "matmul_peaks": self.peaks}

    monkeypatch.setattr(timing.Bench, "prepare", prepare)
    monkeypatch.setattr(timing.Bench, "measure", measure(timing.Row))
    monkeypatch.setattr(steps, "measure", measure(steps.Row))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def start(*parts, **options):
        measured.clear()
        config = SuiteConfig(tmp_path, "cpu", "tiny", parts=parts or tuple(gpu.PARTS), **options)
        return gpu.run(config), list(measured)

    start.statuses = statuses
    return start


def test_continues_where_time_was_up(suite, tmp_path):
    missing, first = suite("parity", "steps", minutes=8)  # four rows and one that is too late
    assert missing == {"parity": 10, "speed": 10, "steps": 4}
    assert len(first) == 10
    assert "not finished: 10 of 14 rows of parity" in (tmp_path / "gpu.md").read_text()
    missing, second = suite("parity", minutes=60)
    assert (missing["parity"], len(second)) == (0, 10)
    assert second[0] == first[4]
    assert suite("parity") == (missing, [])
    assert len(json.loads((tmp_path / "gpu.json").read_text())["parts"]["steps"]) == 4
    missing, third = suite("steps", minutes=1)  # even the first row is too late: a result
    assert (missing["steps"], len(third)) == (3, 1)
    missing, fourth = suite("steps", minutes=60)
    assert (missing["steps"], len(fourth)) == (0, 4)
    assert fourth[-1] == third[0]  # tried again after the others
    assert suite("steps", "parity")[1] == []
    assert "matmul_peaks" in json.loads((tmp_path / "gpu.json").read_text())["machine"]


def test_errors_are_tried_again(suite):
    suite.statuses["upernet finetuned 64 px x 2 float32"] = "error"
    suite.statuses["upernet finetuned 64 px x 2 bfloat16"] = "skipped"
    suite.statuses["mask_rcnn finetuned 64 px x 1 float32"] = "out of memory"
    suite("steps", minutes=60)
    suite.statuses.clear()
    _, again = suite("steps", minutes=60)
    assert again == [f"upernet finetuned 64 px x 2 {dtype}" for dtype in ("float32", "bfloat16")]
    assert suite("steps")[1] == []


def test_other_weights_are_no_continuation(suite, tmp_path):
    suite("steps", minutes=60)
    (tmp_path / "w.pt").touch()
    with pytest.raises(UserError, match="weights: 'random', now"):
        suite("steps", checkpoint=str(tmp_path / "w.pt"))
