"""`tools/visualize_predictions.py`."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from detectron2_runs import DIFFFEED, SMALL, options, write_lazy
from PIL import Image

from diffbackbone.detectron2 import datasets, engine, load_yaml, visualize
from diffbackbone.detectron2.checkpoint import Checkpointer

pytest_plugins = ["detectron2_runs"]
pytestmark = pytest.mark.usefixtures("as_it_was")
CONFIG = str(visualize.CONFIG_DIR / f"{DIFFFEED}.yaml")


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """The folder of a run, with random weights."""
    folder = tmp_path_factory.mktemp("run")
    model = engine.Trainer.build_model(load_yaml(CONFIG, options(folder, **SMALL)))
    Checkpointer(model, str(folder)).save("model_0000001")
    return folder


def test_predictions_and_truth_are_drawn(folder, tmp_path):
    opts = tuple(options(folder, **SMALL))
    picture = tmp_path / "pictures" / "picture.png"
    visualize.main(["--config", DIFFFEED, "--images", "9", "--out", str(picture), *opts])
    with Image.open(picture) as image:
        assert image.width == 1280
    config = visualize.VisualizeConfig(CONFIG, opts, images=9, score=0.01)
    found = visualize.predict(config)
    config.score = 1.0
    empty = visualize.predict(config)
    records = datasets.load_dicts("diffbackbone_sample_val")
    assert len(found) == len(empty) == len(records)
    for record, (truth, drawn), (same, bare) in zip(records, found, empty):
        assert (truth == same).all()
        with Image.open(record["file_name"]) as image:
            size = bare.shape[1::-1]
            photo = np.asarray(image.resize(size, Image.Resampling.NEAREST), dtype=float)
        assert max(size) == 320
        distances = [np.abs(panel - photo).mean() for panel in (bare, truth, drawn)]
        assert distances[0] < 4
        assert min(distances[1:]) > distances[0] + 4


def test_weights_of_a_picture(folder, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(Checkpointer, "load", lambda self, path, *rest: loaded.append(path))
    config = write_lazy(tmp_path / "tiny.py", folder)
    config.write_text(config.read_text() + "\ntrain.init_checkpoint = 'initial.pth'\n")
    for opts, weights in (((), None), (["train.init_checkpoint=x.pth"], None), ((), "y.pth")):
        visualize.load_detector(visualize.VisualizeConfig(str(config), opts, weights))
    (folder / "last_checkpoint").unlink()
    visualize.load_detector(visualize.VisualizeConfig(str(config)))
    assert loaded == [str(folder / "model_0000001.pth"), "x.pth", "y.pth", "initial.pth"]
