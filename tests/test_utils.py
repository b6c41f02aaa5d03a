"""Shared helpers and the command runner."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from torch import nn

from diffbackbone import cli, utils


def test_digest_sees_every_value_and_name():
    module = nn.Linear(3, 2)
    before = utils.weights_digest(module)
    assert utils.weights_digest(module) == before != utils.weights_digest(module, {"bias"})
    with torch.no_grad():
        module.bias[1] += 1e-6
    changed = utils.weights_digest(module)
    assert len({before, changed, utils.weights_digest(nn.Sequential(module))}) == 3


def test_settings_that_changed_are_named():
    saved = {"lr": 0.1, "blocks": [24], "out": "a", "old": 1}
    current = {"lr": 0.1, "blocks": (24, 30), "out": "b", "new": 2}
    changed = utils.changed_settings(saved, current, ignore=["out"])
    assert [text.split(":")[0] for text in changed] == ["blocks", "new", "old"]


def test_json_has_no_nan(tmp_path):
    utils.write_json(tmp_path / "x.json", {"a": [1.5, float("nan")], "b": (float("inf"),)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.5, None], "b": [None]}


def test_cells_cannot_break_a_table():
    table = utils.markdown_table(["name", "value:"], [["a|b\nc", 1]])
    assert table.splitlines() == ["| name | value |", "|---|--:|", r"| a\|b c | 1 |"]


@dataclasses.dataclass
class Options:
    """Options of a command."""

    size: int = 3


@pytest.mark.parametrize("error", [utils.UserError("bad"), FileNotFoundError("no such file")])
def test_user_errors_end_the_command_with_their_message(error, monkeypatch):
    pytest.importorskip("tyro")

    def fail(options):
        assert options.size == 5
        raise error

    with pytest.raises(SystemExit, match=str(error)):
        cli.run_command(Options, fail, ["--size", "5"])
    monkeypatch.setenv("DIFFBACKBONE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.run_command(Options, fail, ["--size", "5"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    old, new, other = (tmp_path / f".{name}.writing" for name in ("partial-a", "partial-b", "c"))
    for left in (old, new, other):
        left.touch()
    for left in (old, other):
        os.utime(left, (1, 1))
    utils.write_text(tmp_path / "x.pth", "a")
    assert names(tmp_path) == [other.name, new.name, "x.pth"]


def test_processes_write_one_file_at_once(tmp_path):
    """As MMEngine's do with the scores of an evaluation."""
    path = tmp_path / "scores.json"

    def inside(partial):
        partial.write_text("first")
        utils.write_text(path, "second")
        assert path.read_text() == "second"

    utils.atomic_write(path, inside)
    assert path.read_text() == "first"
    assert names(tmp_path) == ["scores.json"]


def test_links_stay_and_long_names_fit(tmp_path):
    target, link = tmp_path / "storage" / ("x" * 255), tmp_path / "last.pth"
    link.symlink_to(target)
    for text in ("a", "b"):
        utils.write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    (tmp_path / "plain").write_text("")
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        ("[enforce fail at inline_container.cc:672] . unexpected pos 6804544", OSError),
        ("another error", RuntimeError),
    ],
)
def test_torchs_errors_of_a_full_disk_are_os_errors(tmp_path, error, raised):
    def write(partial):
        partial.write_bytes(b"PK")
        raise RuntimeError(error)

    with pytest.raises(raised):
        utils.atomic_write(tmp_path / "x.pth", write)
    assert not list(tmp_path.iterdir())
