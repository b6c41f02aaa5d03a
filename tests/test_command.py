"""The ``diffbackbone`` command, from the checkout and as the wheel installs it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffbackbone.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]


def test_the_tools_are_the_same_commands():
    functions = set()
    for path in (ROOT / "tools").glob("*.py"):
        imports = [node for node in ast.parse(path.read_text()).body if hasattr(node, "names")]
        module = imports[-1].module.removeprefix("diffbackbone.")
        functions.add(f"{module}:{imports[-1].names[0].name}")
    assert functions == {function for function, _ in COMMANDS.values()}


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--help"], 0), (["train"], 1)])
def test_commands_are_listed(words, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffbackbone", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert bool(stop.value.code) == bool(code)
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_the_wheel_has_all_that_commands_need(tmp_path):
    pytest.importorskip("tyro", reason="tyro is not installed")
    build = ["setup.py", "-q", "build", "--build-base", str(tmp_path)]
    build += ["egg_info", "--egg-base", str(tmp_path)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    installed = tmp_path / "lib" / "diffbackbone"
    for folder in ("configs", "diffbackbone/weights"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        files = [path for path in files if "__pycache__" not in path.parts]
        assert files
        for path in files:
            copy = (
                installed / folder.removeprefix("diffbackbone/") / path.relative_to(ROOT / folder)
            )
            assert copy.read_bytes() == path.read_bytes()
    (tmp_path / "empty").mkdir()
    code = (
        "from diffbackbone.cli import CONFIGS; from diffbackbone.__main__ import main\n"
        "print(CONFIGS); main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "sample-digits", "--help"], cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": str(installed.parent)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(installed / "configs") in run.stdout
    assert "usage: diffbackbone sample-digits" in run.stdout
