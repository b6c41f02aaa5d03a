"""Costs counted from shapes: against the facts of the 256-px model, and against a real run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from diffbackbone import UNet, UNetConfig, inspect_unet
from diffbackbone.checkpoint import CheckpointError, read_unet_config
from diffbackbone.costs import LiveTensors, block_costs, counting_flops
from diffbackbone.inspect_unet import InspectConfig
from diffbackbone.utils import UserError

REAL = UNetConfig.from_preset("gd256_uncond")
TINY = UNetConfig.from_preset("tiny")
SHALLOW = TINY.replace(channel_mult=(1, 2, 2), num_res_blocks=1, attention_strides=(4,))


@pytest.fixture(scope="module")
def costs():
    """Of the 256-px model; the only full count here, which takes seconds."""
    return {cost.index: cost for cost in block_costs(REAL, 256, 256)}


def test_flops_of_the_256_px_model(costs):
    printed = {24: 0.64, 27: 0.74, 30: 0.92, 33: 1.27, 36: 1.99, 37: 2.24}
    assert {b: round(costs[b].flops / 1e12, 2) for b in printed} == printed


def test_parameters_and_shapes(costs):
    output_layer = 2 * 256 + 256 * 6 * 9 + 6
    assert costs[37].total_parameters == 552_814_086 - output_layer
    assert costs[24].parameters == sum(p.numel() for p in meta(24).module(24).parameters())
    assert costs[24].total_parameters == sum(p.numel() for p in meta(24).parameters())
    assert (costs[24].height, costs[24].width, costs[24].channels) == (16, 16, 1024)
    assert (costs[24].name, costs[24].stride) == ("output_blocks.4", 16)


def meta(last):
    with torch.device("meta"):
        return UNet(REAL, last_block=last)


def test_the_type_changes_bytes_only():
    full, half = (block_costs(TINY, 64, 96, t, 5) for t in (torch.float32, torch.bfloat16))
    assert [a.flops for a in full] == [b.flops for b in half]
    assert half[0].activation_bytes < 0.6 * full[0].activation_bytes  # norms are in float32 later
    assert [(a.height, a.width) for a in full] == [(64 // a.stride, 96 // a.stride) for a in full]


@pytest.fixture(scope="module")
def counted():
    return block_costs(SHALLOW, 192, 192, last_block=8)[-1]


@pytest.mark.parametrize("like_a_gpu", [True, False])
def test_counted_without_running_against_a_run(like_a_gpu, counted, monkeypatch):
    """The count is of a GPU's ways; a CPU's don't take more."""
    if like_a_gpu:
        monkeypatch.setattr("diffbackbone.models.ops._picks_kernels", lambda x: False)
    unet = UNet(SHALLOW, counted.index).eval()
    with torch.no_grad(), counting_flops() as counter, LiveTensors() as live:
        unet.forward_features(torch.rand(1, 3, 192, 192), 5, (counted.index,))
    tolerance = 1e-6 if like_a_gpu else 0.05
    assert counter.get_total_flops() == pytest.approx(counted.flops, rel=tolerance)
    assert live.peak == pytest.approx(counted.activation_bytes, rel=0.05)


def test_live_tensors():
    before = torch.ones(1000)
    with LiveTensors() as live:
        a = torch.zeros(1000)
        view = a[10:].view(9, 110)
        old = before[:10]
        assert live.now == live.peak == 4000
        b = a + 1
        assert live.now == 8000
        del a
        assert live.now == 8000  # the view holds it
        del view
        assert live.now == 4000
        b.add_(1)
        assert live.now == 4000
        del b, old
        assert (live.now, live.peak) == (0, 8000)


def test_config_of_a_file(tmp_path):
    path = tmp_path / "model.pt"
    config = TINY.replace(model_channels=64)
    torch.save({"ema": {f"module.{k}": v for k, v in UNet(config).state_dict().items()}}, path)
    found = read_unet_config(path, num_head_channels=32)
    assert found.widths == config.widths
    assert found.num_head_channels == 32
    torch.save(UNet(config, last_block=24).state_dict(), path)
    with pytest.raises(CheckpointError, match="stops short"):
        read_unet_config(path)
    with pytest.raises(FileNotFoundError):
        read_unet_config(tmp_path / "none.pt")


def test_architecture_of_preset_and_checkpoint(monkeypatch):
    asked = []
    monkeypatch.setattr(inspect_unet, "block_costs", lambda *given: asked.append(given) or [])
    inspect_unet.run(InspectConfig("tiny", size=(60, 100)))
    inspect_unet.run(InspectConfig(checkpoint="diffbackbone://tiny.safetensors"))
    (preset, *size), (bundled, *_) = asked
    assert size == [64, 128, torch.float32]
    assert bundled.blocks == preset.blocks
    assert bundled.num_head_channels == preset.num_head_channels != 64
    with pytest.raises(UserError, match="gd256_uncond"):
        inspect_unet.run(InspectConfig("gd255"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspect_unet.run(InspectConfig(checkpoint="none.pt"))


def test_table_and_file(tmp_path, capsys):
    pytest.importorskip("tyro", reason="tyro is not installed")
    out, unet = tmp_path / "costs.json", json.dumps(dataclasses.asdict(SHALLOW))
    options = ["--unet", unet, "--size", "60", "98", "--memory", "0.003", "--json", str(out)]
    inspect_unet.main(options)
    text = capsys.readouterr().out
    assert "60x100 px, float32, one image" in text
    assert "| 8 | output_blocks.0 | 64 | 4 | 15x25 |" in text
    rows = json.loads(out.read_text())
    assert [row["index"] for row in rows] == list(range(1, 14))
    fitting = [r["index"] for r in rows if 4 * r["total_parameters"] + r["activation_bytes"] <= 3e6]
    assert f"blocks up to {fitting[-1]} fit into 0.003 GB" in text
