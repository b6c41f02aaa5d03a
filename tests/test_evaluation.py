"""The frameworks' evaluations find the same in one process and two, in any order and every run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import forked
import golden
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 5

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch has no distributed"
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "sample"
    counts = ["--train", "1", "--val", str(IMAGES), "--unlabelled", "0"]
    forked.run("tools/make_sample_data.py", "--out", root, *counts, log=root.with_name("log"))
    return root


def run_all(commands: dict[str, list], scenes: Path, folder: Path) -> dict[str, str]:
    """Run commands side by side, those with a launcher in two processes; what each printed."""
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    env["DIFFBACKBONE_SAMPLE_DATA"] = str(scenes)
    running = {}
    try:
        for name, command in commands.items():
            ranks = forked.ranks(2) if "--launcher" in command else [{}]
            running[name] = [
                forked.Script(command, folder / f"{name}{index}.log", {**env, **rank})
                for index, rank in enumerate(ranks)
            ]
        return {name: "".join(p.finish(300) for p in running[name]) for name in commands}
    finally:
        for process in itertools.chain(*running.values()):
            process.kill()


MMSEG = """
_base_ = "{base}"
unet = dict(_delete_=True, preset="tiny", channel_mult=(1, 1, 1, 1, 2), num_res_blocks=1)
unet["attention_strides"] = (8, 16)
model = dict(backbone=dict(unet=unet, blocks=[20, 18, 15, 12], init_cfg=None))
test_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    sampler=dict(shuffle={shuffle}),
    dataset=dict(
        data_root="{data}",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(80, 64), keep_ratio=False),
            dict(type="LoadAnnotations", reduce_zero_label=True),
            dict(type="PackSegInputs"),
        ],
    ),
)
randomness = dict(seed={seed})
"""


def test_mmseg_evaluation(scenes, tmp_path):
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    import diffbackbone.mmseg  # noqa: F401

    base = ROOT / "configs" / "mmseg" / "upernet_difffeed_sample.py"
    data = scenes / "ADEChallengeData2016"
    weights = tmp_path / "weights.pth"
    commands = {}
    for name, shuffle, seed in ("one", False, 0), ("two", True, 2):
        config = tmp_path / f"{name}.py"
        config.write_text(MMSEG.format(base=base, data=data, shuffle=shuffle, seed=seed))
        command = ["tools/mmseg_test.py", config, weights, "--out", tmp_path / name]
        command += ["--work-dir", tmp_path / f"{name}.work"]
        (tmp_path / name).mkdir()  # the first process makes it, but the second doesn't wait
        commands[name] = command
    commands["two"] += ["--launcher", "pytorch"]

    init_default_scope("mmseg")
    torch.manual_seed(2)
    model = MODELS.build(Config.fromfile(tmp_path / "one.py").model)
    golden.fill(model.backbone)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)  # all classes come up
    torch.save({"state_dict": model.state_dict(), "meta": {}}, weights)

    run_all(commands, scenes, tmp_path)
    pictures, scores = {}, {}
    for name in commands:
        files = (tmp_path / name).glob("*.png")
        pictures[name] = {path.name: np.asarray(Image.open(path)) for path in files}
        (path,) = (tmp_path / f"{name}.work").glob("*/*.json")
        scores[name] = json.loads(path.read_text())
    assert len(pictures["one"]) == IMAGES
    assert len(np.unique(np.stack([*pictures["one"].values()][:1]))) > 2
    assert pictures["two"].keys() == pictures["one"].keys()
    for file, labels in pictures["one"].items():
        np.testing.assert_array_equal(labels, pictures["two"][file], err_msg=file)
    for key in ("aAcc", "mIoU", "mAcc"):
        assert scores["two"][key] == scores["one"][key]


def test_detectron2_evaluation(scenes, tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    tool = ["tools/train_net.py", "--config", "mask_rcnn_difffeed_sample"]
    options = {
        "INPUT.MIN_SIZE_TEST": 64,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01,
        "MODEL.DIFFUSION.CHECKPOINT": "",
        "MODEL.DIFFUSION.UNET_OPTIONS.channel_mult": "(1, 1, 1, 1, 2)",
        "MODEL.DIFFUSION.UNET_OPTIONS.num_res_blocks": 1,
        "MODEL.DIFFUSION.UNET_OPTIONS.attention_strides": "(8, 16)",
        "MODEL.DIFFUSION.BLOCKS": "(12,)",
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.MAX_ITER": 1,
        "SOLVER.IMS_PER_BATCH": 1,
        "SOLVER.STEPS": "()",
        "TEST.EVAL_PERIOD": 0,
        "SEED": 3,
    }
    words = [str(word) for pair in options.items() for word in pair]
    trained, two = tmp_path / "trained", tmp_path / "two"
    run_all({"train": [*tool, *words, "OUTPUT_DIR", trained]}, scenes, tmp_path)
    tool += ["--eval-only", "--num-gpus", "2", "--dist-url", "auto", *words, "SEED", "4"]
    tool += ["MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", two]
    assert "World size: 2" in run_all({"two": tool}, scenes, tmp_path)["two"]
    found = predictions(trained)
    assert len({entry["image_id"] for entry in found}) == IMAGES
    assert found == predictions(two)


def predictions(folder: Path) -> list[dict]:
    found = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    return sorted(found, key=lambda entry: json.dumps(entry, sort_keys=True))
