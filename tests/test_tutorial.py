"""The tutorial notebook, from beginning to end, with little data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for package in ("accelerate", "matplotlib", "sklearn", "torchmetrics", "transformers", "tyro"):
    pytest.importorskip(package, reason=f"{package} is not installed")

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tutorial.ipynb"


def test_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFBACKBONE_QUICK", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict = {}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert "mean IoU" in capsys.readouterr().out
    assert names["best"]["b"] in (18, 24)
    assert (tmp_path / "work_dirs/tutorial/upernet/predictions.png").is_file()
