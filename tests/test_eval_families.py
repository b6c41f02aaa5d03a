"""The evaluation commands, costs and export on networks of diffusers and timm."""

from __future__ import annotations

import dataclasses
import json

import image_folders
import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("timm", reason="timm is not installed")

import accelerate
import diffusers
from safetensors.torch import save_file

from diffbackbone import export, inspect_unet
from diffbackbone.eval import classify, knn, sweep
from diffbackbone.eval import visualize_features as visualize
from diffbackbone.eval.recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore:.*weights are RANDOM")
GROUPS = {"norm_num_groups": 8, "sample_size": 32, "attention_head_dim": 8}
LEVELS = {"block_out_channels": (16, 32)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    image_folders.write_folder(root / "data/train", 5, 0)
    image_folders.write_folder(root / "data/val", 3, 1)
    torch.manual_seed(0)
    diffusers.UNet2DModel(
        **GROUPS, **LEVELS, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(root / "ddpm")  # fmt: skip
    diffusers.UNet2DConditionModel(
        **GROUPS, **LEVELS, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(root / "sd")  # fmt: skip
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(root / "vae")  # fmt: skip
    diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=8, sample_size=16,
        num_embeds_ada_norm=10, in_channels=4,
    ).save_pretrained(root / "dit")  # fmt: skip
    save_file({"prompt_embeds": torch.randn(1, 5, 24)}, root / "prompt.safetensors")
    return root


@pytest.fixture(params=["ddpm", "sd", "dit", "timm"])
def options(root, request):
    """The network, two of its blocks and a timestep."""
    unet = {"preset": f"diffusers://{root / request.param}"}
    if request.param in ("sd", "dit"):
        unet["vae"] = str(root / "vae")
    if request.param == "sd":
        unet["condition"] = str(root / "prompt.safetensors")
    if request.param == "timm":
        unet = {"preset": "timm:test_resnet", "pretrained": False}
    timesteps = (0,) if request.param == "timm" else (90,)
    return dict(unet=json.dumps(unet), blocks=(3, 5), timesteps=timesteps, device="cpu")


def test_evaluation(root, options, tmp_path):
    data = dict(data=root / "data", image_size=32, workers=0, batch_size=4)
    found = sweep.run(
        sweep.SweepConfig(**options, **data, pools=(1,), k=3, cka=True, out=tmp_path / "sweep")
    )
    assert all(cell["flops"] > 0 for cell in found["cells"])
    rows = knn.run(knn.KnnConfig(**options, **data, k=(3,), out=tmp_path / "knn"))
    swept = {(cell["b"], cell["t"]): cell["knn"] for cell in found["cells"]}
    assert swept == {(row["b"], row["t"]): row["top1"] for row in rows}
    one = {**options, **data, "blocks": options["blocks"][:1], "out": tmp_path / "classifier"}
    head = dict(head="attention", width=16, num_heads=2, layers=1, epochs=1, log_with="none")
    classify.run(dataclasses.replace(RECIPES["probe"], **one, **head))
    assert (tmp_path / "classifier/best.pt").is_file()
    options |= dict(images=(root / "data/val",), out=tmp_path / "features.png")
    visualize.run(visualize.VisualizeFeaturesConfig(**options))
    assert options["out"].stat().st_size > 1000


def test_cka_with_another_network(root, tmp_path):
    unet = json.dumps({"preset": "timm:test_resnet", "pretrained": False})
    options = dict(data=root / "data/val", workers=0, batch_size=4, cka_only=True, cka_with=unet)
    same = dict(unet=unet, blocks=(3, 5), timesteps=(0,), noise="none", out=tmp_path / "same")
    *_, part = sweep.run(sweep.SweepConfig(**options, **same))["cka"]
    assert (part["between"], part["labels"]) == ("networks", [3, 5])
    assert part["columns"] == list(range(1, 6))
    assert part["cka"][0][2] == pytest.approx(1) == part["cka"][1][4]
    assert part["cka"][0][4] < 0.999
    noised = dict(unet=f"diffusers://{root / 'ddpm'}", timesteps=(20, 400), image_size=64)
    noised |= dict(blocks=(3, 5, 7), out=tmp_path / "other")
    found = sweep.run(sweep.SweepConfig(**options, **noised))["cka"]
    parts = [part for part in found if part["between"] == "networks"]
    assert [part["at"] for part in parts] == [20, 400]
    for part in parts:
        assert np.shape(part["cka"]) == (3, 5)
        assert (tmp_path / "other" / part["file"]).stat().st_size > 1000
        assert part["file"] in (tmp_path / "other/summary.md").read_text()


def test_all_processes_share_the_work_of_another_network(root, tmp_path, monkeypatch):
    """Else those that only help would end, and the first one wait for them."""
    opened = []
    monkeypatch.setattr(accelerate.PartialState, "is_main_process", False)
    monkeypatch.setattr(sweep, "open_caches", lambda config, *args: opened.append(args[0]) or [0])
    unet = json.dumps({"preset": "timm:test_resnet", "pretrained": False})
    options = dict(data=root / "data/val", cka_only=True, unet=unet, blocks=(3,), timesteps=(0,))
    assert sweep.run(sweep.SweepConfig(**options, cka_with=unet, out=tmp_path)) == {}
    assert [list(folders) for folders in opened] == [["images"], ["other"]]


def test_costs_and_export(root, options, tmp_path, capsys):
    inspect_unet.main(["--unet", options["unet"], "--size", "64"])
    assert "GFLOP" in capsys.readouterr().out
    export.main(
        ["--unet", options["unet"], "--blocks", "5", "--size", "64", "--timestep",
         str(options["timesteps"][0]), "--format", "pt2", "--out", str(tmp_path / "a.pt2")]
    )  # fmt: skip
    (x,) = torch.export.load(tmp_path / "a.pt2").module()(torch.zeros(1, 3, 64, 64))
    assert x.isfinite().all()


def test_export_needs_weights(tmp_path):
    for words in (["--format", "pt2"], ["--format", "safetensors", "--unet", "timm:resnet10t"]):
        with pytest.raises(SystemExit):
            export.main([*words, "--out", str(tmp_path / "a")])
    assert not list(tmp_path.iterdir())
