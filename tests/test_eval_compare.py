"""`tools/compare.py`."""

from __future__ import annotations

import json

import image_folders
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("timm", reason="timm is not installed")

from diffbackbone.eval import compare
from diffbackbone.eval.compare import CompareConfig
from diffbackbone.utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
from image_folders import one_thread, weights  # noqa: E402, F401

RESNET = '{"preset": "timm:test_resnet", "pretrained": false}'


@pytest.fixture(scope="module")
def config(tmp_path_factory, weights):  # noqa: F811
    root = tmp_path_factory.mktemp("compare")
    image_folders.write_folder(root / "train", 10, 0, contrast=15)
    image_folders.write_folder(root / "val", 8, 1, contrast=15)
    return CompareConfig(
        models=(f"tiny={weights}", RESNET), data=root, out=root / "out", timesteps=(30, 90),
        depths=(0.5, 1.0), pools=(1,), image_size=32, batch_size=4, workers=0, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "SECONDS", 0.05)
        patch.setattr(compare.sweep, "LARGEST_CACHE", 0)  # of large sets, too, there is kNN
        yield compare.run(config)


def test_each_network_is_shown_at_its_best_tap(config, rows):
    assert [row["model"] for row in rows] == list(config.models)
    assert json.loads((config.out / "results.json").read_text()) == rows
    assert (config.out / "compare.png").stat().st_size > 1000
    for row in rows:
        out = compare.sweep_of(config, row["model"]).out
        found = json.loads((out / "results.json").read_text())
        for measure in ("linear", "knn"):
            assert row[measure] == max(cell[measure] for cell in found["cells"])
        (cell,) = (c for c in found["cells"] if all(c[k] == row[k] for k in ("b", "t", "pool")))
        assert (cell["linear"], cell["flops"]) == (row["linear"], row["flops"])
    assert (config.out / "summary.md").read_text() == compare.summarize(rows)


def test_the_best_network_comes_first(rows):
    for scores in ((0.2, 0.7), (0.7, 0.2)):
        changed = [{**row, "linear": score} for row, score in zip(rows, scores)]
        text = compare.summarize(changed)
        assert 0 < text.index("| 70.0 |") < text.index("| 20.0 |")


def test_costs(config, rows):
    unet, resnet = rows
    assert unet["t"] in (30, 90)
    assert resnet["t"] == 0
    full = compare.sweep_of(config, RESNET)
    shallow, deep = (
        compare.measure_cost(full, {"b": b, "t": 0}, 32) for b in (1, max(full.blocks))
    )
    assert shallow["parameters"] < deep["parameters"] < 12e6
    assert deep["memory"] > 4 * deep["parameters"]
    assert deep["images_per_second"] > 0


def test_models(config):
    own = compare.sweep_of(config, "timm:resnet18=epoch=1.pth")
    assert (own.unet, own.checkpoint, own.noise) == ("timm:resnet18", "epoch=1.pth", "none")
    assert (own.pools, own.seeds, own.device, own.workers) == ((1,), (0,), "cpu", 0)
    assert compare.sweep_of(config, f"{RESNET}=a.pth").checkpoint == "a.pth"
    own = compare.sweep_of(config, RESNET)
    assert (own.unet, own.checkpoint, own.blocks, own.timesteps) == (RESNET, None, (3, 5), (0,))
    own = compare.sweep_of(config, "gd256_uncond")
    assert (own.unet, own.blocks, own.timesteps) == ("gd256_uncond", (19, 37), (30, 90))
    with pytest.raises(UserError, match="duplicates"):
        compare.run(CompareConfig(models=("tiny", "tiny")))
