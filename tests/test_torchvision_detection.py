"""The documented snippets for torchvision, timm and segmentation_models_pytorch run as they are."""

from __future__ import annotations

import pytest
import torch
from snippets import run_snippet


def test_mask_rcnn():
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    names = run_snippet("timm.md", "torchvision's Mask R-CNN")
    model = names["model"]
    assert names["losses"].keys() >= {"loss_classifier", "loss_mask", "loss_objectness"}
    assert all(loss.isfinite() for loss in names["losses"].values())
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert names["predictions"][0].keys() == {"boxes", "labels", "scores", "masks"}
    maps = model.backbone(torch.zeros(1, 3, 96, 128))
    assert [tuple(x.shape[-2:]) for x in maps.values()] == [
        (24, 32), (12, 16), (6, 8), (3, 4), (2, 2),
    ]  # fmt: skip
    small = torch.rand(3, 50, 70)
    losses = model.train()([torch.rand(3, 96, 128), small], [names["target"], no_objects(small)])
    assert all(loss.isfinite() for loss in losses.values())


def no_objects(image):
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.long),
        "masks": torch.zeros(0, *image.shape[-2:], dtype=torch.uint8),
    }


def test_timm_features(capsys):
    pytest.importorskip("timm")
    names = run_snippet("timm.md", "timm")
    assert "[32, 64, 64, 64, 96]\n[2, 4, 8, 16, 32]\n" in capsys.readouterr().out
    assert [tuple(x.shape[-2:]) for x in names["maps"]][:2] == [(64, 96), (32, 48)]


def test_segmentation_models_pytorch():
    pytest.importorskip("segmentation_models_pytorch")
    assert run_snippet("timm.md", "segmentation_models_pytorch")["scores"].shape == (2, 12, 64, 96)
