"""Shared helpers and the command runner."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from diffbackbone import cli, utils


def test_streams_of_one_seed_are_independent_and_repeatable():
    streams = utils.RandomStream
    draws = [stream.generator(3, 1).random() for stream in streams]
    assert len(set(draws)) == len(streams)
    assert draws == [stream.generator(3, 1).random() for stream in streams]
    assert streams.FLIPS.generator(3, 1).random() == np.random.default_rng([3, 1, 1]).random()


def test_digest_sees_every_value_and_name():
    module = nn.Linear(3, 2)
    before = utils.weights_digest(module)
    assert utils.weights_digest(module) == before
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
    names: tuple[str, ...] = ("a",)


def test_command_gets_its_options():
    pytest.importorskip("tyro")
    options = cli.run_command(Options, lambda o: o, ["--size", "5", "--names", "x", "y"])
    assert options == Options(5, ("x", "y"))


@pytest.mark.parametrize("error", [utils.UserError("bad"), FileNotFoundError("no such file")])
def test_user_errors_end_the_command_with_their_message(error, monkeypatch):
    pytest.importorskip("tyro")

    def fail(options):
        raise error

    with pytest.raises(SystemExit, match=str(error)):
        cli.run_command(Options, fail, [])
    monkeypatch.setenv("DIFFBACKBONE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.run_command(Options, fail, [])
