"""`tools/evaluate_classifier.py` against the classifier's own scores."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

import golden
import image_folders

from diffbackbone.diffusion import NoiseSchedule, coordinate_noise
from diffbackbone.eval.data import RowImages, list_folder
from diffbackbone.eval.evaluate_classifier import EvaluateConfig, run
from diffbackbone.models import build_network, resolve_network
from diffbackbone.models.classifier import EncoderUNet
from diffbackbone.utils import UserError

FIELDS = {
    "preset": "gd256_classifier", "model_channels": 32, "channel_mult": [1, 1], "image_size": 32,
    "attention_strides": [2], "num_head_channels": 32, "num_res_blocks": 1, "out_channels": 20,
}  # fmt: skip
NAMES = ["class2", "x", "class0", "y", "z", "class1", "w", *map(str, range(13))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifier")
    image_folders.write_folder(root / "val", 12, 0)
    torch.manual_seed(0)
    network = golden.fill(build_network(resolve_network(FIELDS)))
    rows = RowImages(list_folder(root / "val"), 32)
    x = torch.stack([rows[0, i] for i in range(36)])
    with torch.no_grad():  # else the images differ less than the classes
        network.out[2].c_proj.bias -= network(x, 0).mean(0)
    torch.save(network.state_dict(), root / "classifier.pt")
    (root / "names.txt").write_text("\n".join(NAMES))
    return root


def options(root, **changes):
    names = {"classes": root / "names.txt", "out": root / "out", "workers": 0, "batch_size": 5}
    own = {"checkpoint": str(root / "classifier.pt"), "unet": json.dumps(FIELDS), "device": "cpu"}
    return EvaluateConfig(**{**own, "data": root / "val", **names, **changes})


@pytest.mark.parametrize("timestep", [0, 700])
@torch.no_grad()
def test_shares_are_those_of_the_classifier(root, timestep, tmp_path, monkeypatch):
    forward, given = EncoderUNet.forward, []
    monkeypatch.setattr(
        EncoderUNet, "forward", lambda self, x, t: given.append(t) or forward(self, x, t)
    )
    found = run(options(root, timestep=timestep, out=tmp_path))
    assert set(given) == {timestep}
    network = build_network(resolve_network(FIELDS)).eval()
    network.load_state_dict(torch.load(root / "classifier.pt", weights_only=True))
    folder = list_folder(root / "val")
    rows = RowImages(folder, 32)
    x = torch.stack([rows[0, i] for i in range(len(folder))])
    if timestep:
        x = NoiseSchedule("linear").add_noise(x, timestep, coordinate_noise(3, 32, 32))
    order = network(x, timestep).argsort(1, descending=True)
    truth = [NAMES.index(folder.classes[label]) for label in folder.labels]
    right = order == torch.tensor(truth)[:, None]
    assert found["top1"] == pytest.approx(right[:, 0].float().mean().item())
    assert found["top5"] == pytest.approx(right[:, :5].any(1).float().mean().item())
    assert found["top1"] <= found["top5"] < 1
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert (tmp_path / "confusion.png").is_file()


def test_folders_must_match_the_outputs(root):
    with pytest.raises(UserError, match="20 outputs"):
        run(options(root, classes=None))
    with pytest.raises(UserError, match="not a classifier"):
        run(options(root, unet="tiny"))
