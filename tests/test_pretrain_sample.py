"""`tools/sample.py`: images, labels, the ancestral sampler, FID."""

from __future__ import annotations

import json
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")
pytest.importorskip("tyro")
pytest.importorskip("torchvision")

import image_folders

from diffbackbone import UNet, UNetConfig, utils
from diffbackbone.diffusion import NoiseSchedule
from diffbackbone.pretrain import sample
from diffbackbone.pretrain.sampling import sample_ddpm
from diffbackbone.utils import UserError

SMALL = UNetConfig(
    32, (1, 1), 1, (2,), num_head_channels=16, image_size=16, num_classes=5, out_channels=6
)
FIELDS = json.dumps(
    {"model_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "attention_strides": [2],
     "num_head_channels": 16, "image_size": 16, "num_classes": 5, "out_channels": 6}
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.manual_seed(0)
    torch.save(image_folders.fill_zeros(UNet(SMALL)).state_dict(), path)
    return str(path)


def generate(weights, out, **options):
    options = {"count": 5, "steps": 3, "device": "cpu", "unet": FIELDS, **options}
    images = sample.run(sample.SampleConfig(checkpoint=weights, out=out, **options))
    with np.load(out / "samples.npz") as file:
        assert (file["arr_0"] == images).all()
        return dict(file)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_images_depend_on_seed_and_number_alone(sampler, weights, tmp_path):
    found = generate(weights, tmp_path / "a", sampler=sampler)
    assert found["arr_0"].shape == (5, 16, 16, 3)
    assert found["arr_0"].dtype == np.uint8
    assert found["arr_1"].shape == (5,)
    assert set(found["arr_1"]) <= set(range(5))
    again = generate(weights, tmp_path / "b", sampler=sampler, batch_size=2, count=3)
    difference = again["arr_0"].astype(int) - found["arr_0"][:3]
    assert np.abs(difference).max() <= 1
    assert (again["arr_1"] == found["arr_1"][:3]).all()
    other = generate(weights, tmp_path / "c", sampler=sampler, seed=1)
    assert np.abs(other["arr_0"].astype(int) - found["arr_0"]).max() > 20
    assert np.abs(found["arr_0"][0].astype(int) - found["arr_0"][1]).max() > 20
    with Image.open(tmp_path / "a/samples.png") as picture:
        assert picture.width >= 3 * 16


def test_every_image_and_step_has_noise_of_its_own(weights, tmp_path, monkeypatch):
    draw, keys = sample.draw_noise, []
    monkeypatch.setattr(sample, "draw_noise", lambda *key: keys.append(key) or draw(*key))
    generate(weights, tmp_path, sampler="ddpm", count=3, batch_size=2)
    assert len(set(keys)) == len(keys) == 3 * 3


def test_label(weights, tmp_path):
    found = generate(weights, tmp_path, label=3)
    assert set(found["arr_1"]) == {3}
    with pytest.raises(UserError, match="5 classes"):
        generate(weights, tmp_path, label=5)
    with pytest.raises(UserError, match="pipelines"):
        generate(weights, tmp_path, unet="gd256_classifier")


@pytest.mark.parametrize("learned", [True, False])
def test_ancestral_steps_follow_the_posterior(learned):
    """Two steps, computed from the definitions of DDPM."""
    schedule, x = NoiseSchedule([0.3, 0.6]), torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
    seen = []

    def predict(x_t, t):
        seen.append((x_t, t))
        return torch.cat([0.1 * x_t, torch.full_like(x_t, 0.5)][: 1 + learned], dim=1)

    found = sample_ddpm(predict, schedule, iter([x, torch.ones_like(x)]), 2)
    assert [t for _, t in seen] == [1, 0]
    now, then = (float(schedule.alphas_cumprod[t]) for t in (1, 0))
    beta = 1 - now / then
    start = ((x - math.sqrt(1 - now) * 0.1 * x) / math.sqrt(now)).clamp(-1, 1)
    mean = (math.sqrt(then) * beta * start + math.sqrt(1 - beta) * (1 - then) * x) / (1 - now)
    small = beta * (1 - then) / (1 - now)
    variance = beta**0.75 * small**0.25 if learned else beta
    torch.testing.assert_close(seen[1][0], mean + math.sqrt(variance))
    x = seen[1][0]
    torch.testing.assert_close(
        found, ((x - math.sqrt(1 - then) * 0.1 * x) / math.sqrt(then)).clamp(-1, 1)
    )


def test_fid_is_refused_before_sampling(weights, tmp_path, monkeypatch):
    options = dict(fid_reference=tmp_path, fid_weights=tmp_path / "none.pth")
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torch-fidelity"):
        generate(weights, tmp_path / "a", **options)
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda name: "there")
    with pytest.raises(UserError, match=r"none\.pth does not exist"):
        generate(weights, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_fid_sees_all_images(kind, weights, tmp_path, monkeypatch):
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    reference = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / "reference"
    if kind == "npz":
        path = path.with_suffix(".npz")
        np.savez(path, arr_0=reference)
    else:
        path.mkdir()
        for i, pixels in enumerate(reference):
            Image.fromarray(pixels).save(path / f"{i:03d}.png")
    seen = {True: [], False: []}
    metric = types.SimpleNamespace(
        update=lambda batch, real: seen[real].append(batch), compute=lambda: torch.tensor(7.5)
    )
    monkeypatch.setattr(fid, "FrechetInceptionDistance", lambda **_: metric)
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda name: "there")
    (tmp_path / "weights.pth").touch()
    options = dict(fid_reference=path, fid_weights=tmp_path / "weights.pth")
    found = generate(weights, tmp_path / "out", **options)
    for real, expected in ((True, reference), (False, found["arr_0"])):
        assert (torch.cat(seen[real]).permute(0, 2, 3, 1).numpy() == expected).all()
    assert json.loads((tmp_path / "out/fid.json").read_text()) == {"fid": 7.5, "images": 5}
