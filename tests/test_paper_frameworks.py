"""The framework commands of docs/paper.md, each trained for an iteration on small data."""

from __future__ import annotations

import json
import re

import forked
import pytest
from test_paper_page import ROWS

from diffbackbone.sample_data import make_sample_data

SEGMENTATION = {
    "train_dataloader.num_workers": 0, "train_dataloader.persistent_workers": False,
    "val_dataloader.num_workers": 0, "val_dataloader.persistent_workers": False,
    "train_dataloader.dataset.pipeline.3.crop_size": "(128,128)",
    "val_dataloader.dataset.pipeline.1.scale": "(256,128)",
    "model.data_preprocessor.size": "(128,128)",
    "model.decode_head.channels": 32, "model.auxiliary_head.channels": 32,
    "model.test_cfg.crop_size": "(128,128)", "model.test_cfg.stride": "(128,128)",
    "train_cfg.max_iters": 1, "train_cfg.val_interval": 1, "default_hooks.logger.interval": 1,
}  # fmt: skip
UNET = {
    "model.backbone.unet": "tiny", "model.backbone.init_cfg": "None",
    "model.backbone.out_channels": 32, "model.decode_head.in_channels": "[32,32,32,32]",
    "model.auxiliary_head.in_channels": 32,
}  # fmt: skip
RESNET = {
    "model.pretrained": "None", "model.backbone.stem_channels": 8,
    "model.backbone.base_channels": 8, "model.decode_head.in_channels": "[32,64,128,256]",
    "model.auxiliary_head.in_channels": 128,
}  # fmt: skip
VIT = {
    "model.pretrained": "None", "model.backbone.num_layers": 4, "model.backbone.embed_dims": 48,
    "model.backbone.img_size": "(128,128)",
    "model.backbone.num_heads": 2, "model.backbone.out_indices": "[0,1,2,3]",
    "model.neck.embed_dim": 48, "model.decode_head.in_channels": "[48,48,48,48]",
    "model.auxiliary_head.in_channels": 48,
}  # fmt: skip
DETECTION = {
    "MODEL.DEVICE": "cpu", "INPUT.MIN_SIZE_TRAIN": "(64,)", "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.LSJ.SIZE": 64, "MODEL.FPN.OUT_CHANNELS": 32, "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64, "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.005, "TEST.DETECTIONS_PER_IMAGE": 5,
    "SOLVER.MAX_ITER": 1, "SOLVER.STEPS": "(2,)", "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.AMP.ENABLED": False, "TEST.EVAL_PERIOD": 0, "DATALOADER.NUM_WORKERS": 0,
}  # fmt: skip
LAZY = {
    "train.device": "cpu", "train.max_iter": 1, "train.init_checkpoint": "",
    "train.amp.enabled": False, "train.eval_period": 2, "dataloader.train.num_workers": 0,
    "dataloader.test.num_workers": 0, "dataloader.train.total_batch_size": 2,
    "dataloader.train.mapper.augmentations.size": 64, "model.backbone.net.depth": 2,
    "model.backbone.net.embed_dim": 64, "model.backbone.net.num_heads": 2,
    "model.backbone.net.window_block_indexes": "[0]", "model.backbone.net.img_size": 64,
    "model.backbone.square_pad": 64,
    "dataloader.test.mapper.augmentations.0.short_edge_length": 64,
    "model.roi_heads.box_predictor.test_topk_per_image": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sample scenes where the configs look for ADE20K and COCO, with COCO's 80 categories."""
    root = tmp_path_factory.mktemp("frameworks")
    make_sample_data(root / "datasets", train=4, val=1, unlabelled=0)
    return root


@pytest.fixture
def coco(folder, monkeypatch):
    builtin = pytest.importorskip(
        "detectron2.data.datasets.builtin_meta", reason="detectron2 is not installed"
    )
    things = [dict(c) for c in builtin.COCO_CATEGORIES if c["isthing"]]
    for path in (folder / "datasets/coco/annotations").glob("instances_*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "categories": things}))
    monkeypatch.chdir(folder)


def rows(*commands: str) -> list:
    return [pytest.param(words, id=row) for row, words in ROWS if words[1] in commands]


@pytest.mark.parametrize("words", rows("mmseg-train"))
def test_segmentation(words, folder, tmp_path):
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
    kinds = {"_mae": VIT, "_r50": RESNET, "_gd": UNET, "_difffeed": UNET}
    (kind,) = (value for name, value in kinds.items() if name in words[2])
    options = SEGMENTATION | kind
    for split in ("train", "val"):
        options[f"{split}_dataloader.dataset.data_root"] = folder / "datasets/ADEChallengeData2016"
    overrides = [f"{name}={value}" for name, value in options.items()]
    command = ["tools/mmseg_train.py", *words[2:], "--work-dir", tmp_path, "--cfg-options"]
    printed = forked.run(*command, *overrides, log=tmp_path / "log")
    assert re.search(r"mIoU: +\d", printed)
    assert (tmp_path / "iter_1.pth").is_file()


@pytest.mark.parametrize("words", rows("train-net"))
def test_detection(words, coco, tmp_path):
    from diffbackbone.detectron2 import train_net

    options = {**DETECTION, "OUTPUT_DIR": tmp_path}
    if "_gd" in words[3]:
        options |= {"MODEL.DIFFUSION.UNET": "tiny", "MODEL.DIFFUSION.CHECKPOINT": ""}
    else:
        options["MODEL.WEIGHTS"] = ""
    train_net.main([*words[2:], *(str(word) for pair in options.items() for word in pair)])
    assert (tmp_path / "inference/coco_instances_results.json").is_file()


@pytest.mark.parametrize("words", rows("lazyconfig-train-net"))
def test_detection_of_python_configs(words, coco, tmp_path):
    from diffbackbone.detectron2 import lazyconfig_train_net

    options = [f"{name}={value}" for name, value in {**LAZY, "train.output_dir": tmp_path}.items()]
    lazyconfig_train_net.main([*words[2:], *options])
    assert (tmp_path / "model_final.pth").is_file()
    assert "bbox/AP" in (tmp_path / "metrics.json").read_text()
