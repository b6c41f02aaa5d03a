"""`tools/visualize_predictions.py`."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from detectron2.data import DatasetCatalog
from detectron2_runs import DIFFFEED, SHORT, options, start, write_lazy
from PIL import Image

from diffbackbone.detectron2 import visualize
from diffbackbone.detectron2.checkpoint import Checkpointer

pytest_plugins = ["detectron2_runs"]
pytestmark = pytest.mark.usefixtures("as_it_was")


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """The folder of a run with a log and random weights."""
    folder = tmp_path_factory.mktemp("run")
    model = visualize.read_config(DIFFFEED, options(folder, **SHORT)).build()
    Checkpointer(model, str(folder)).save("model_final")
    (folder / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.0, "bbox/AP50": 9.0}')
    return folder


def test_picture(folder, tmp_path):
    picture = tmp_path / "pictures" / "picture.png"
    command = ["--config", DIFFFEED, "--images", "9", "--out", picture]
    start("tools/visualize_predictions.py", *command, *options(folder, **SHORT))
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        height = image.height
    weights = ["--weights", str(folder / "model_final.pth")]
    command = [*map(str, command), *weights, *options(tmp_path / "gone", **SHORT)]
    visualize.main(command)  # of these weights there are no curves
    with Image.open(picture) as image:
        assert image.height < height


def test_predictions_and_truth_are_drawn(folder):
    keys = {**SHORT, "TEST.DETECTIONS_PER_IMAGE": 20}
    detector = visualize.read_config(DIFFFEED, options(folder, **keys))
    weights = visualize.choose_weights(detector, [])
    assert weights == str(folder / "model_final.pth")
    found = visualize.predict(detector, weights, 9, 0.01)
    empty = visualize.predict(detector, weights, 9, 1.0)
    records = DatasetCatalog.get("diffbackbone_sample_val")
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


def test_weights_of_a_picture(folder, tmp_path, refused):
    config = write_lazy(tmp_path / "tiny.py", folder)
    config.write_text(config.read_text() + f"\ntrain.init_checkpoint = '{tmp_path}/gone.pth'\n")
    detector = visualize.read_config(str(config), [])
    assert visualize.choose_weights(detector, []) == str(folder / "model_final.pth")
    option = "train.init_checkpoint=x.pth"
    detector = visualize.read_config(str(config), [option])
    assert visualize.choose_weights(detector, [option]) == "x.pth"
    assert "gone.pth" in refused("--config", config, "--weights", tmp_path / "gone.pth",
                                 tool=visualize)  # fmt: skip


def test_curves_of_a_resumed_run(tmp_path):
    assert visualize.read_curves(tmp_path) == {}
    lines = [
        '{"iteration": 19, "total_loss": 2.0}',
        '{"iteration": 19, "bbox/AP50": 10.0, "segm/AP50": 5.0}',
        '{"iteration": 39, "total_loss": 9.0}',
        '{"iteration": 39, "total_loss": 1.0}',
        '{"iteration": 59, "tot',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    curves = visualize.read_curves(tmp_path)
    assert curves == {
        "total_loss": [(20, 2.0), (40, 1.0)],
        "bbox/AP50": [(20, 10.0)],
        "segm/AP50": [(20, 5.0)],
    }
    panel = np.zeros((320, 320, 3), np.uint8)
    figure = visualize.draw([(panel, panel)] * 3, curves)
    drawn = {
        line.get_label(): line.get_xydata().tolist() for ax in figure.axes for line in ax.lines
    }
    assert [*map(tuple, drawn["boxes"])] == [(20, 10.0)]
    assert [*map(tuple, drawn["masks"])] == [(20, 5.0)]
    assert len(figure.axes) == 6 + 2
