"""Runs that are killed at random moments end as if they had not been.

``DIFFBACKBONE_KILLS=20 pytest tests/test_faults.py`` is the long way.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import forked
import pytest

from diffbackbone.checkpoint import read_checkpoint
from diffbackbone.sample_data import make_sample_data

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("DIFFBACKBONE_KILLS", "2"))
ITERATIONS = 4 + 2 * KILLS

# few blocks for quick steps, and wide ones in the middle: files take a while to write
UNET = {"channel_mult": (1, 1, 1, 1, 4), "num_res_blocks": 1, "attention_strides": (16,)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "sample"
    make_sample_data(root, train=12, val=2, unlabelled=0)
    return root


CONFIG = """
_base_ = "{base}"
data = dict(dataset=dict(data_root="{data}"))
train_dataloader = dict(batch_size=2, **data)
val_dataloader = dict(num_workers=0, persistent_workers=False, **data)
model = dict(
    backbone=dict(
        init_cfg=None,
        unet=dict(_delete_=True, preset="tiny", **{unet}),
        blocks=[20, 18, 15, 12],
        out_channels=16,
        noise="random",
    ),
    decode_head=dict(in_channels=[16] * 4, channels=16, dropout_ratio=0.1),
    auxiliary_head=dict(in_channels=16, channels=16),
)
train_cfg = dict(max_iters={iterations}, val_interval=10_000)
default_hooks = dict(checkpoint=dict(interval=2, max_keep_ckpts=1, save_best="mIoU"))
randomness = dict(seed=7)
"""


def mmseg_command(scenes: Path, folder: Path) -> list:
    config = folder.with_name("config.py")
    base = ROOT / "configs" / "mmseg" / "upernet_difffeed_sample.py"
    data = scenes / "ADEChallengeData2016"
    config.write_text(CONFIG.format(base=base, data=data, unet=UNET, iterations=ITERATIONS))
    return ["tools/mmseg_train.py", config, "--work-dir", folder]


def detectron2_command(scenes: Path, folder: Path) -> list:
    options = {
        "OUTPUT_DIR": folder,
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.STEPS": f"({ITERATIONS - 2},)",
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SOLVER.CHECKPOINT_KEEP": 1,
        "INPUT.MIN_SIZE_TRAIN": "(48, 64)",
        "INPUT.RANDOM_FLIP": "horizontal",
        "DATALOADER.NUM_WORKERS": 1,
        "DATASETS.TEST": "()",
        "SEED": 7,
        "MODEL.DIFFUSION.CHECKPOINT": "",
        "MODEL.DIFFUSION.NOISE": "random",
        "MODEL.DIFFUSION.BLOCKS": "(12,)",
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
        **{f"MODEL.DIFFUSION.UNET_OPTIONS.{name}": value for name, value in UNET.items()},
    }
    words = [word for pair in options.items() for word in pair]
    return ["tools/train_net.py", "--config-file", "mask_rcnn_difffeed_sample", *words]


# the command, what it prints when training begins, its last file and the key of weights in it
FRAMEWORKS = {
    "mmseg": (mmseg_command, "Checkpoints will", f"iter_{ITERATIONS}.pth", "state_dict"),
    "detectron2": (detectron2_command, "Starting training", "model_final.pth", "model"),
}


def last_checkpoint(folder: Path) -> Path | None:
    note = folder / "last_checkpoint"
    return folder / Path(note.read_text()).name if note.exists() else None


@contextlib.contextmanager
def started(command: Sequence, scenes: Path, log: Path) -> Iterator[forked.Script]:
    """A run in a process group of its own, which ends with the block."""
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    process = forked.Script(command, log, {**env, "DIFFBACKBONE_SAMPLE_DATA": str(scenes)})
    try:
        yield process
    finally:
        process.kill()


def wait_for(condition, process: forked.Script, log: Path, seconds: float = 240) -> bool:
    """Wait until a condition holds; False where the run ended well before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.returncode is not None:
            assert process.returncode == 0, log.read_text()[-4000:]
            return False
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.002)
    return True


def iteration(path: Path | None) -> int:
    """How many iterations a checkpoint has behind it; it has to be whole."""
    if path is None:
        return 0
    content = read_checkpoint(path)  # fails where it is not
    return content["meta"]["iter"] if "meta" in content else content["iteration"] + 1


@pytest.mark.skipif(sys.platform != "linux", reason="processes are killed as on Linux")
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_killed_runs_end_as_unbroken_ones(name, scenes, tmp_path):
    pytest.importorskip(name, reason=f"{name} is not installed")
    make_command, begun, final, weights = FRAMEWORKS[name]
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"

    def has_begun() -> bool:
        return begun in log.read_text("utf8", "replace")

    with started(make_command(scenes, whole), scenes, log) as process:
        assert wait_for(has_begun, process, log)
        start = time.monotonic()
        assert process.wait(timeout=600) == 0, log.read_text()[-4000:]
        seconds = time.monotonic() - start

    draws = random.Random(os.environ.get("DIFFBACKBONE_KILL_SEED", "0"))
    command, done, killed = make_command(scenes, broken), 0, []
    for kill in range(KILLS):
        left = set(broken.glob(".*.writing"))  # by runs that were killed before

        def written(left=left) -> set[Path]:
            return set(broken.glob(".*.writing")) - left

        with started(command, scenes, log) as process:
            if not wait_for(has_begun, process, log):
                break  # there was nothing left to do
            if kill % 2 == 0:  # while a file is written, at first with nothing to go on from
                wait_for(written, process, log)
            else:
                wait_for(lambda: last_checkpoint(broken) is not None, process, log)
                time.sleep(draws.uniform(0, seconds / KILLS))
        writing = sorted(path.name.split(".")[1] for path in written())  # and never was
        last = last_checkpoint(broken)
        before, done = done, iteration(last)
        killed.append((done, *writing))
        assert done >= before, killed
        if last is not None and "--resume" not in command:
            command.insert(1, "--resume")
    assert len(killed) == KILLS, killed
    assert any(len(entry) > 1 for entry in killed), "no kill met a file that was being written"
    assert "--resume" in command
    for left in broken.glob(".*.writing"):
        os.utime(left, (1, 1))  # as if the next run came hours later
    with started(command, scenes, log) as process:
        assert process.wait(timeout=600) == 0, log.read_text()[-4000:]
    a, b = (read_checkpoint(folder / final)[weights] for folder in (whole, broken))
    assert a.keys() == b.keys()
    for key, value in a.items():
        tolerance = 1e-6 * max(1.0, float(value.abs().max()))
        assert (value.double() - b[key].double()).abs().max() <= tolerance, key
    kept = [sorted(path.name for path in folder.glob("*.pth")) for folder in (whole, broken)]
    assert kept[0] == kept[1]
    assert not list(broken.glob(".*.writing"))
