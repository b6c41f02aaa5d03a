"""Fixtures and helpers of the tests that run the Detectron2 commands, as a pytest plugin."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import forked
import pytest
import torch
from detectron2.utils.logger import setup_logger
from torch.utils._pytree import tree_flatten_with_path

from diffbackbone.detectron2 import SAMPLE_ROOT, register_sample_data, train_net
from diffbackbone.sample_data import make_sample_data

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "detectron2"
SAMPLE = "mask_rcnn_gd_sample"
DIFFFEED = "mask_rcnn_difffeed_sample"
SMALL = {
    "MODEL.DIFFUSION.CHECKPOINT": "",
    "MODEL.DIFFUSION.UNET_OPTIONS.channel_mult": "(1, 1, 1, 1, 2)",
    "MODEL.DIFFUSION.UNET_OPTIONS.num_res_blocks": 1,
    "MODEL.DIFFUSION.UNET_OPTIONS.attention_strides": "(8, 16)",
    "MODEL.DIFFUSION.BLOCKS": "(12,)",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01,  # it learned too little for more
    "TEST.DETECTIONS_PER_IMAGE": 20,
    "SEED": 7,
}
SHORT = {
    "SOLVER.MAX_ITER": 6,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SOLVER.CHECKPOINT_KEEP": 2,
    "INPUT.MIN_SIZE_TRAIN": "(48, 64)",  # drawn anew for each image, as are flips
    "INPUT.RANDOM_FLIP": "horizontal",
    "DATALOADER.NUM_WORKERS": 1,
    **SMALL,
}
LAZY = """
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec

parts = ("dataloader", "lr_multiplier", "optimizer", "train")
dataloader, lr_multiplier, optimizer, train = LazyConfig.load("{base}/coco_10ep.py", parts)
model = LazyConfig.load("{base}/mask_rcnn_gd.py", "model")

unet = dict(preset="tiny", channel_mult=[1] * 5, num_res_blocks=1, attention_strides=[16])
model.backbone.net.update(unet=unet, blocks=[12], checkpoint=None)
model.backbone.out_channels = 32
model.proposal_generator.head.in_channels = 32
heads = model.roi_heads
heads.num_classes = 10
box, mask = ShapeSpec(channels=32, height=7, width=7), ShapeSpec(channels=32, height=14, width=14)
heads.box_head.update(input_shape=box, conv_dims=[32], fc_dims=[64])
heads.box_predictor.update(input_shape=ShapeSpec(channels=64), test_score_thresh=0.01)
heads.box_predictor.test_topk_per_image = 20
heads.mask_head.update(input_shape=mask, conv_dims=[32, 32])

dataloader.train.update(total_batch_size=2, num_workers=1)
dataloader.train.dataset.names = "diffbackbone_sample_train"
dataloader.train.mapper.augmentations.size = 64
dataloader.test.num_workers = 0
dataloader.test.dataset.names = "diffbackbone_sample_val"
dataloader.test.mapper.augmentations[0].short_edge_length = 64
dataloader.evaluator.output_dir = "{folder}/inference"

train.update(output_dir="{folder}", max_iter=6, eval_period=0, log_period=1, device="cpu")
train.checkpointer.update(period=2, max_to_keep=3)
train.amp.enabled = False
optimizer.lr = 1e-3
lr_multiplier.warmup_length = 0.3
lr_multiplier.scheduler.update(values=[1.0, 0.1], milestones=[4], num_updates=6)
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A few scenes, registered under the sample data's names."""
    root = tmp_path_factory.mktemp("data") / "sample"
    make_sample_data(root, train=12, val=3, unlabelled=0)
    register_sample_data(root)
    yield root
    register_sample_data()


@pytest.fixture
def copied_data(data, tmp_path):
    """A copy that is registered in its place."""
    root = shutil.copytree(data, tmp_path / "copy")
    register_sample_data(root)
    yield root
    register_sample_data(data)


@pytest.fixture
def as_it_was():
    """Detectron2's `default_setup` adds log handlers and sets what holds for the process."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "diffbackbone")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    benchmark, state = torch.backends.cudnn.benchmark, torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in processes of their own: results agree to the last bit
    yield
    torch.set_num_threads(threads)
    setup_logger.cache_clear()
    for logger, (handlers, level, propagate) in zip(loggers, before):
        for handler in set(logger.handlers).difference(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    torch.backends.cudnn.benchmark = benchmark
    torch.set_rng_state(state)


def options(folder: Path, **changes) -> list[str]:
    keys = {
        "OUTPUT_DIR": folder,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": "(4,)",
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.IMS_PER_BATCH": 2,
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "INPUT.MIN_SIZE_TEST": 64,
        "TEST.EVAL_PERIOD": 0,
        **changes,
    }
    return [str(word) for pair in keys.items() for word in pair]


@pytest.fixture
def small(data, tmp_path):
    """Options that make the sample config train within a second."""
    return options(tmp_path / "work", **SMALL)


@pytest.fixture
def refused(capsys):
    """Run a command that is to end with an error message; return the message."""

    def run(*arguments, tool=train_net) -> str:
        with pytest.raises(SystemExit) as exit_:
            tool.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        message = str(exit_.value.code)
        assert "Traceback" not in printed.err + message
        return printed.err if message == "2" else message  # argparse's

    return run


def write_lazy(path: Path, folder: Path) -> Path:
    path.write_text(LAZY.format(base=CONFIGS / "_base_", folder=folder))
    return path


@pytest.fixture
def python_config(data, tmp_path):
    return write_lazy(tmp_path / "tiny.py", tmp_path / "work")


def start(data: Path, log: Path, *command) -> str:
    """Run a script in a process of its own, to an end without errors."""
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1", SAMPLE_ROOT: str(data)}
    return forked.run(*command, log=log, env=env)


def read_results(folder: Path) -> dict[str, float]:
    """The last evaluation of a training run."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [line for line in lines if "bbox/AP" in line][-1]


def assert_resumes(main, command: Sequence[str], whole: Path, folder: Path) -> None:
    """A copy of a run that goes back to iteration 4 of 6 ends as the run did, to the last bit."""
    (folder / "model_final.pth").unlink()
    (folder / "model_0000005.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    (folder / "model_0000000.pth").touch()  # of an earlier run: counts as kept, too
    main(["--resume", *command])
    a, b = (torch.load(p / "model_final.pth", weights_only=True) for p in (whole, folder))
    a, b = (tree_flatten_with_path(content) for content in (a, b))
    assert a[1] == b[1]
    for (path, value), (_, other) in zip(a[0], b[0]):
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, path
    assert predictions(folder) == predictions(whole)
    names = [[path.name for path in sorted(p.glob("*.pth"))] for p in (whole, folder)]
    assert names[0] == names[1]


def predictions(folder: Path, kind: str = "inference") -> list:
    """What the last evaluation wrote."""
    found = json.loads((folder / kind / "coco_instances_results.json").read_text())
    assert len(found) > 20
    return found
