"""A network of another family needs one file: a table of blocks and `embed`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffbackbone import DiffusionBackbone
from diffbackbone.models.base import BlockInfo, BlockTable, DiffusionModel


class ToyBlock(nn.Module):
    """One convolution that adds the timestep."""

    def __init__(self, info: BlockInfo) -> None:
        super().__init__()
        self.resample = info.resample
        self.conv = nn.Conv2d(info.in_channels, info.channels, 3, padding=1)

    def forward(self, h, emb):
        if self.resample == "down":
            h = nn.functional.avg_pool2d(h, 2)
        elif self.resample == "up":
            h = nn.functional.interpolate(h, scale_factor=2.0)
        return torch.tanh(self.conv(h) + emb)


class ToyUNet(DiffusionModel):
    """Encoder of three blocks, middle, decoder of three."""

    def __init__(self) -> None:
        parts = ["encoder"] * 3 + ["middle"] + ["decoder"] * 3
        rows = [(8, 1, 3, None), (16, 2, 8, "down"), (16, 2, 16, None), (16, 2, 16, None)]
        rows += [(16, 2, 32, None), (8, 1, 32, "up"), (8, 1, 16, None)]
        super().__init__(
            BlockTable(
                BlockInfo(i + 1, c, stride, f"layers.{i}", c_in, resample=how, part=part)
                for i, ((c, stride, c_in, how), part) in enumerate(zip(rows, parts))
            )
        )
        self.layers = nn.ModuleList(ToyBlock(info) for info in self.blocks.values())

    def embed(self, t, y, device):
        return torch.as_tensor(t, device=device).float().reshape(-1, 1, 1, 1) / 1000


@pytest.fixture
def toy() -> ToyUNet:
    torch.manual_seed(0)
    return ToyUNet()


def test_taps_equal_a_forward_pass_by_hand(toy):
    x = torch.randn(2, 3, 8, 12)
    emb = toy.embed(90, None, x.device)
    h, skips, expected = x, [], {}
    for b, block in enumerate(toy.layers, 1):
        h = block(torch.cat([h, skips.pop()], 1) if b > 4 else h, emb)
        if b < 4:
            skips.append(h)
        expected[b] = h
    taps = toy.forward_features(x, 90, (7, 2, 5))
    assert list(taps) == [7, 2, 5]
    for b, h in taps.items():
        info = toy.blocks[b]
        assert h.shape == (2, info.channels, 8 // info.stride, 12 // info.stride)
        assert torch.equal(h, expected[b])


@pytest.mark.parametrize("feedback", [None, "all", {6: 2}])
def test_backbone_and_feedback_take_any_family(toy, feedback):
    backbone = DiffusionBackbone(
        toy, timestep=50, blocks=(7, 3), feedback=feedback, out_channels=4, out_strides=(2, 4)
    ).train()
    maps = backbone(torch.rand(2, 3, 33, 50) * 2 - 1)
    assert [tuple(x.shape) for x in maps] == [(2, 4, 17, 25), (2, 4, 9, 13)]
    sum(x.square().mean() for x in maps).backward()
    missing = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
