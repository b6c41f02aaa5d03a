"""Every command of docs/paper.md starts on small data of the real layout."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import image_folders
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

import diffusers
import test_docs
import test_eval_fgvc
from safetensors.torch import save_file

from diffbackbone.models import build_network, resolve_network

PAGE = test_docs.ROOT / "docs/paper.md"
ROWS = [
    (cells[1], shlex.split(command))
    for line in PAGE.read_text().splitlines()
    if (cells := [cell.strip() for cell in line.split("|")])[1:2] and line.startswith("| ")
    for command in re.findall(r"`(diffbackbone [^`]*)`", cells[2] if len(cells) > 2 else "")
]
CLASSIFIER = {
    "preset": "gd256_classifier", "model_channels": 32, "channel_mult": [1, 1], "image_size": 32,
    "attention_strides": [2], "num_head_channels": 32, "num_res_blocks": 1, "out_channels": 3,
}  # fmt: skip
TIMM = '{"preset": "timm:%s", "pretrained": false, "img_size": 32, "depth": 12, "embed_dim": 48}'
pytestmark = pytest.mark.filterwarnings("ignore:.*weights are RANDOM")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the placeholders of the page stand for."""
    root = tmp_path_factory.mktemp("paper")
    for name in ("IMAGENET", "CUB"):
        image_folders.write_folder(root / name / "train", 4, 0)
        image_folders.write_folder(root / name / "val", 2, 1)
    image_folders.write_folder(root / "IMAGENET50", 2, 0)
    (root / "imagenet50.txt").write_text("class0\nclass2\n")
    image_folders.write_weights(root / "GD")
    classifier = build_network(resolve_network(CLASSIFIER))
    torch.save(classifier.state_dict(), root / "256x256_classifier.pt")
    (root / "CUB_200_2011").mkdir()
    test_eval_fgvc.make_birds(root / "CUB_200_2011")
    diffusers.UNet2DConditionModel(
        norm_num_groups=8, sample_size=32, attention_head_dim=8, cross_attention_dim=24,
        block_out_channels=(16, 16, 16, 16),
    ).save_pretrained(root / "SD15")  # fmt: skip
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(root / "vae")  # fmt: skip
    save_file({"prompt_embeds": torch.randn(1, 5, 24)}, root / "prompt.safetensors")
    return root


def shrink(config, name: str, out: Path):
    """Make a command's options small, without touching what the page's row is about."""
    fields = {field.name for field in dataclasses.fields(config)}
    small = {
        "out": out, "image_size": 32, "epochs": 1, "width": 32, "num_heads": 2, "workers": 0,
        "device": "cpu", "log_with": "none", "count": 2, "steps": 2, "partial": True, "k": (3,),
        "batch_size": 8, "cka_images": 4, "seeds": (0,),
    }  # fmt: skip
    small = {key: value for key, value in small.items() if key in fields}
    if name == "sweep":
        small.update(k=3, timesteps=config.timesteps[:2], blocks=config.blocks[:2] or (12, 24))
        if config.cka_with:
            small["cka_with"] = TIMM % "vit_tiny_patch16_224"
    if name == "label-efficiency":  # whose own images are made, which takes longer
        small.update(data=Path("IMAGENET"), steps=dict.fromkeys(config.steps, 1))
    if name == "knn":
        small.update(timesteps=config.timesteps[:2])
    if getattr(config, "subset", None):
        small["subset"] = "50%"
    if "pool" in fields and config.pool:
        small["pool"] = min(config.pool, 4)
    if getattr(config, "hidden", ()):
        small["hidden"] = tuple(16 for _ in config.hidden)
    unet = getattr(config, "unet", None)
    if unet == "gd256_classifier":
        small["unet"] = json.dumps(CLASSIFIER)
    elif unet == "SD15":
        own = {"vae": "vae", "condition": "prompt.safetensors"}
        small["unet"] = json.dumps({"preset": "diffusers://SD15", **own})
    elif unet and unet.startswith("timm:vit"):
        small["unet"] = TIMM % "vit_tiny_patch16_224"
    elif unet and unet.startswith("timm:"):
        small["unet"] = '{"preset": "timm:resnet10t", "pretrained": false}'
    elif name == "inspect":
        fields = {"channel_mult": [1, 1], "num_res_blocks": 1, "attention_strides": [2]}
        small["unet"] = json.dumps({"preset": "tiny", **fields})
    elif "unet" in fields:
        small["unet"] = "tiny"
    return dataclasses.replace(config, **small)


@pytest.mark.parametrize(("row", "words"), ROWS, ids=[f"{a} {b[1]}" for a, b in ROWS])
def test_commands_run(row, words, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    module, function, arguments = test_docs.find_main(tuple(words))
    name, run = words[1], getattr(module, "run", None)
    if name in ("mmseg-train", "train-net", "lazyconfig-train-net"):
        # test_paper_frameworks.py trains the frameworks' configs
        test_docs.test_commands_parse(("docs/paper.md", *words), monkeypatch, tmp_path)
        return
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    results = []
    monkeypatch.setattr(
        module, "run", lambda config: results.append(run(shrink(config, name, tmp_path / "out")))
    )
    getattr(module, function)(arguments)
    assert len(results) == 1
    assert name == "inspect" or list((tmp_path / "out").iterdir())


def test_every_table_and_figure_has_a_row():
    text = " ".join(row for row, _ in ROWS)
    for number in range(1, 16):
        assert re.search(rf"Table {number}\b", text), number
    for number in (3, 4, 5, 7, 8, 9):
        assert f"Figure {number}" in text
