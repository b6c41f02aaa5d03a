"""The matrix of environments: what becomes of each cell, and of an interrupted run.

Nothing is installed: an interpreter stands in that makes environments of itself, and does as a plan
says when it is asked for pip and pytest.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("check_matrix", ROOT / "tools" / "check_matrix.py")
tool = importlib.util.module_from_spec(SPEC)
sys.modules["check_matrix"] = tool  # dataclasses look there
SPEC.loader.exec_module(tool)

STAND_IN = """#!{python}
import json, os, shutil, sys, time
from pathlib import Path
words, me = sys.argv[1:], Path(sys.argv[0])
plan = json.loads(Path({plan!r}).read_text())
cell = next((part[4:] for part in me.parts if part.startswith("env-")), "")
plan = plan.get(cell, {{}})
with open({calls!r}, "a") as file:
    print(json.dumps([cell, *words[:3]]), file=file)
if words[:2] == ["-m", "venv"]:
    (Path(words[2]) / "bin").mkdir(parents=True)
    shutil.copy(me, Path(words[2]) / "bin" / "python")
elif words[:2] == ["-m", "pip"]:
    with open({calls!r} + ".pip", "a") as file:
        print(json.dumps([cell, *words, os.environ["PIP_CONSTRAINT"]]), file=file)
    if "pip" in plan:
        print("some\\nERROR: " + plan["pip"] + "\\nERROR: No  matching", file=sys.stderr)
        sys.exit(1)
elif words[:2] == ["-m", "pytest"]:
    time.sleep(plan.get("sleep", 0))
    tests, failures, errors, skipped = plan.get("tests", (9, 0, 0, 2))
    report = next(word for word in words if word.startswith("--junitxml="))[11:]
    if not plan.get("crash"):
        Path(report).write_text(
            '<testsuites><testsuite tests="%d" failures="%d" errors="%d" skipped="%d"/>'
            "</testsuites>" % (tests, failures, errors, skipped)
        )
    print("Segmentation fault" if plan.get("crash") else "done")
    sys.exit(plan.get("code", int(failures + errors > 0)))
elif "metadata" in words[1]:
    print(json.dumps({{"python": "3.9.7", "torch": "2.1.2+cu121", "numpy": "1.24.4", "pip": "1"}}))
else:
    print({version!r})
"""
OLD, NEW = "core-3.9-old", "core-3.9-new"


class Machine:
    """Interpreters, a folder to work in, and a plan of what happens in each cell."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work, self.plan = folder, folder / "work", folder / "plan.json"
        self.calls_file = folder / "calls"
        self.plan.write_text("{}")
        self.python = self.interpreter("3.9")

    def interpreter(self, version: str, name: str = "python3.9") -> Path:
        path = self.folder / name
        settings = {"plan": str(self.plan), "calls": str(self.calls_file), "version": version}
        path.write_text(STAND_IN.format(python=sys.executable, **settings))
        path.chmod(0o755)
        return path

    def __call__(self, *cells: str, plan: dict | None = None, options: tuple[str, ...] = ()) -> int:
        self.plan.write_text(json.dumps(plan or {}))
        self.calls_file.write_text("")
        python = f"--python=3.9={self.python}"
        return tool.entry(["--work", str(self.work), python, *options, "--cells", *cells])

    def ran(self, what: str) -> list[str]:
        lines = map(json.loads, self.calls_file.read_text().splitlines())
        return [line[0] for line in lines if line[1:3] == ["-m", what]]

    def rows(self) -> dict[str, dict]:
        content = json.loads((self.work / "matrix.json").read_text())
        return {row["cell"]: row for row in content["rows"]}


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_a_cell_that_passes(machine, capsys):
    assert machine(OLD) == 0
    row = machine.rows()[OLD]
    assert (row["outcome"], row["reason"]) == ("passed", "")
    assert (row["passed"], row["failed"], row["skipped"]) == (7, 0, 2)
    assert (row["python"], row["versions"]) == (
        "3.9.7",
        {"torch": "2.1.2+cu121", "numpy": "1.24.4"},
    )
    table = (machine.work / "matrix.md").read_text()
    line = f"| {OLD} | 3.9.7 | 2.1.2+cu121 | 1.24.4 | none | core | 7 passed | 2 | 0.0 min |"
    assert line in table.splitlines()
    assert "Tests *core*: test_unet.py, " in table
    assert table in capsys.readouterr().out
    # pip is given the pins, and this package, so that setup.py has a say
    words = json.loads(Path(f"{machine.calls_file}.pip").read_text())
    assert {"torch==2.1.2", "numpy==1.24.4", "-e", str(ROOT), "setuptools<82"} <= set(words)
    assert words[-1].endswith("limits.txt")
    assert "PIP_CONSTRAINT" not in os.environ
    assert list(machine.work.glob("env-*")) == []


def test_a_failing_cell_shows_and_others_run(machine):
    plan = {OLD: {"tests": (9, 1, 1, 2)}}
    assert machine(OLD, NEW, plan=plan) == 1
    rows = machine.rows()
    assert (rows[OLD]["outcome"], rows[OLD]["passed"], rows[OLD]["failed"]) == ("failed", 5, 2)
    assert rows[NEW]["outcome"] == "passed"
    assert "5 passed, **2 failed**: pytest ended with 1" in (machine.work / "matrix.md").read_text()
    assert list(machine.work.glob("env-*")) == []


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"crash": True, "code": 139}, "pytest ended with 139: Segmentation fault"),
        ({"code": 3}, "pytest ended with 3"),
        ({"tests": (0, 0, 0, 0), "code": 5}, "pytest ended with 5"),
        ({"tests": (3, 0, 0, 3)}, "pytest ended with 0"),  # nothing was shown
        ({"sleep": 60}, "ended after 1 s"),
    ],
)
def test_tests_that_do_not_come_to_their_end(machine, plan, reason):
    assert machine(OLD, plan={OLD: plan}, options=("--timeout", "1")) == 1
    row = machine.rows()[OLD]
    assert row["outcome"] == "failed"
    assert row["reason"].startswith(reason)
    assert row["seconds"] < 20


def test_what_pip_says_stands_in_the_row(machine):
    plan = {OLD: {"pip": "first"}}
    assert machine(OLD, plan=plan) == 1
    row = machine.rows()[OLD]
    assert (row["outcome"], row["reason"]) == ("not run", "pip: No matching")
    assert machine.ran("pytest") == []
    line = f"| {OLD} | 3.9 | (2.1.2) | (1.24.4) | none | core | not run: pip: No matching |  |  |"
    assert line in (machine.work / "matrix.md").read_text().splitlines()


def test_an_interpreter_that_is_not_there(machine, monkeypatch):
    monkeypatch.setenv("PATH", str(machine.folder / "nothing"))
    assert machine("core-3.13-old", OLD) == 1
    rows = machine.rows()
    assert rows["core-3.13-old"]["outcome"] == "not run"
    assert rows["core-3.13-old"]["reason"].startswith("no python3.13 on PATH")
    assert rows[OLD]["outcome"] == "passed"
    # one that is something else, as a shim without its version
    machine.interpreter("3.8")
    assert machine(NEW) == 1
    assert machine.rows()[NEW]["reason"].endswith("is no Python 3.9: it says '3.8'")
    machine.python.write_text("no program")
    assert machine(NEW) == 1
    assert "does not start" in machine.rows()[NEW]["reason"]


def test_interpreters_are_found_on_path(machine, monkeypatch):
    machine.interpreter("3.13", "python3.13")
    monkeypatch.setenv("PATH", str(machine.folder))
    assert machine("core-3.13-old") == 0


def test_a_wheel_that_has_to_be_given(machine, tmp_path):
    wheel = tmp_path / "mmcv-2.1.0-cp311-cp311-linux_x86_64.whl"
    machine.interpreter("3.11", "python3.11")
    python = ("--python", f"3.11={tmp_path / 'python3.11'}")
    assert machine("mmcv-full", options=python) == 1
    assert machine.rows()["mmcv-full"]["reason"] == "no --mmcv-wheel was given"
    wheel.write_text("")
    assert machine("mmcv-full", options=(*python, "--mmcv-wheel", str(wheel))) == 0
    assert str(wheel) in json.loads(Path(f"{machine.calls_file}.pip").read_text())


def test_the_same_command_goes_on(machine):
    assert machine(OLD, NEW, plan={NEW: {"tests": (2, 1, 0, 0)}}) == 1
    assert machine(OLD, NEW) == 0
    assert machine.ran("pytest") == [NEW]  # what passed stands
    assert machine(OLD, NEW) == 0
    assert machine.ran("pytest") == []
    assert machine(OLD, options=("--again",)) == 0
    assert machine.ran("pytest") == [OLD]


def test_a_cell_that_is_another_now_runs_again(machine, monkeypatch):
    assert machine(OLD) == 0
    monkeypatch.setitem(tool.TESTS, "core", ("test_unet.py",))
    assert machine(OLD) == 0
    assert machine.ran("pytest") == [OLD]


def test_an_interruption_keeps_what_is_there(machine, monkeypatch):
    def interrupted(command, *rest):
        if "pytest" in command and NEW in command[0]:
            raise KeyboardInterrupt
        return execute(command, *rest)

    execute = tool.execute
    monkeypatch.setattr(tool, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        machine(OLD, NEW)
    assert machine.rows().keys() == {OLD}
    assert list(machine.work.glob("env-*")) == []
    monkeypatch.setattr(tool, "execute", execute)
    assert machine(OLD, NEW) == 0
    assert machine.ran("pytest") == [NEW]


def test_tables_are_written_whole(machine, monkeypatch):
    assert machine(OLD) == 0
    before = {path.name: path.read_bytes() for path in machine.work.glob("matrix.*")}
    assert set(before) == {"matrix.json", "matrix.md"}

    def full(path, text, encoding):
        path.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        tool.write_rows(machine.work, {})
    assert {path.name: path.read_bytes() for path in machine.work.glob("*matrix.*")} == before


def test_a_damaged_table_is_named(machine):
    machine.work.mkdir()
    for text in ("", "{}", '{"rows": [{"cell": 3}]}'):
        (machine.work / "matrix.json").write_text(text)
        with pytest.raises(SystemExit, match=r"matrix\.json is no table of this tool"):
            machine(OLD)


def test_keep(machine):
    assert machine(OLD, options=("--keep",)) == 0
    assert (machine.work / f"env-{OLD}" / "bin" / "python").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cells", "core"], "invalid choice"),
        (["--python", "3.8=/usr/bin/python"], "VERSION of 3.9, 3.10, 3.11, 3.12, 3.13"),
        (["--python", "3.9"], "takes VERSION=PATH"),
        (["--mmcv-wheel", "/nowhere.whl"], "--mmcv-wheel: there is no file '/nowhere.whl'"),
    ],
)
def test_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit):
        tool.entry(options)
    assert message in capsys.readouterr().err


def test_list_runs_nothing(machine, capsys):
    assert tool.entry(["--list", "--work", str(machine.work)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(tool.CELLS)
    assert lines[0].startswith(f"{OLD}: Python 3.9, torch==2.1.2, numpy==1.24.4")
    assert not machine.work.exists()


# ---- the cells ------------------------------------------------------------------------------


def test_cells_are_whole():
    names = [cell.name for cell in tool.CELLS]
    assert len(set(names)) == len(names)
    for cell in tool.CELLS:
        assert cell.python in tool.PYTHONS
        assert set(cell.wheels) <= {"detectron2", "mmcv"}
        for name in tool.TESTS[cell.tests]:
            assert (ROOT / "tests" / name).is_file(), name


def test_the_claim_in_setup_py_is_what_the_cells_show():
    """Oldest and newest Python, and the floors of torch, numpy and safetensors."""
    claimed = (ROOT / "setup.py").read_text()
    low, high = re.search(r'python_requires=">=3\.(\d+),<3\.(\d+)"', claimed).groups()
    assert [f"3.{minor}" for minor in range(int(low), int(high))] == list(tool.PYTHONS)
    core = ("core", "short")
    assert {cell.python for cell in tool.CELLS if cell.tests in core} == set(tool.PYTHONS)
    requires = ast.literal_eval(re.search(r"install_requires=(\[.*?\])", claimed, re.DOTALL)[1])
    for requirement in map(Requirement, requires):
        marker, (floor,) = requirement.marker, requirement.specifier
        assert floor.operator == ">="
        holds = marker.evaluate if marker else lambda _: True
        cells = [c for c in tool.CELLS if holds({"python_version": c.python})]
        name = f"{requirement.name}=="
        pins = [p.removeprefix(name) for c in cells for p in c.packages if p.startswith(name)]
        oldest = min(pins, key=Version)
        assert f"{oldest}.".startswith(f"{floor.version}."), str(requirement)
