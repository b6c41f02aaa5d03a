"""Exact resuming, whole checkpoints and lost losses under MMEngine's own runner."""

from __future__ import annotations

import os
import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed")

from mmengine.dataset import InfiniteSampler
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import diffbackbone.openmmlab.checks  # noqa: F401  registers
from diffbackbone.openmmlab.engine import WholeCheckpointHook
from diffbackbone.openmmlab.repairs import apply_repairs

apply_repairs()


class Noisy(torch.utils.data.Dataset):
    """Samples by all three generators, as augmentation draws them."""

    metainfo: ClassVar = {"classes": ("a",)}
    loaded: ClassVar = []

    def __len__(self):
        return 7

    def __getitem__(self, index):
        self.loaded.append(index)
        draws = random.random(), np.random.rand(), float(torch.rand(()))
        return {"inputs": torch.tensor([index, *draws], dtype=torch.float32)}


class Model(BaseModel):
    """A regression with dropout, whose loss can be made to fail."""

    def __init__(self, fail_at=(), fail="loss"):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.fail_at, self.fail, self.calls = fail_at, fail, 0

    def forward(self, inputs, mode="tensor"):
        x = self.linear(nn.functional.dropout(torch.stack(inputs) / 7, training=self.training))
        if mode != "loss":
            return x
        self.calls += 1
        loss = x.square().mean()
        if self.calls in self.fail_at:
            if self.fail == "loss":
                return {"loss_a": loss * float("nan"), "loss_b": loss}
            nn.init.constant_(self.linear.bias, float("inf"))
        return {"loss_a": loss}


class Score(BaseMetric):
    """A rising score, so that each evaluation is the best."""

    scores: ClassVar = []

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.scores.append(len(self.scores))
        return {"mIoU": float(len(self.scores))}


class Record(Hook):
    """Keeps what the iterations saw; may end the run as a crash would."""

    def __init__(self, stop_after=None):
        self.stop_after, self.seen = stop_after, {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen[runner.iter] = torch.stack(data_batch["inputs"]).tolist()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    Score.scores = []
    Noisy.loaded.clear()
    # asks compilers for their versions, seconds for each runner
    monkeypatch.setattr("mmengine.runner.runner.collect_env", dict)


ENDLESS = dict(type="InfiniteSampler", shuffle=True)


def make(folder, *, seed=3, iterations=12, record=None, workers=0, sampler=ENDLESS, **changes):
    """A run with a validation every 4 iterations and a checkpoint every 2."""
    loader = dict(batch_size=2, num_workers=workers, collate_fn=dict(type="pseudo_collate"))
    in_order = dict(type="DefaultSampler", shuffle=False)
    checkpoint = dict(type="WholeCheckpointHook", by_epoch=False, interval=2, max_keep_ckpts=2)
    checkpoint = {**checkpoint, "save_best": "mIoU", **changes.pop("checkpoint", {})}
    torch.manual_seed(0)
    settings = dict(
        model=Model(),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=Noisy(),
            sampler=sampler,
            persistent_workers=workers > 0,
            **loader,
        ),
        train_cfg=dict(type="ResumableIterBasedTrainLoop", max_iters=iterations, val_interval=4),
        val_dataloader=dict(dataset=Noisy(), sampler=in_order, **loader),
        val_cfg=dict(),
        val_evaluator=Evaluator([Score()]),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-2)),
        param_scheduler=dict(type="PolyLR", by_epoch=False, begin=0, end=iterations, eta_min=0),
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=1, log_metric_by_epoch=False),
            checkpoint=checkpoint,
            check_loss=dict(type="CheckLossHook"),
        ),
        custom_hooks=[record] if record else None,
        randomness=dict(seed=seed),
        log_level="ERROR",
        experiment_name=f"run{random.SystemRandom().random()}",
    )
    return Runner(**{**settings, **changes})


def weights(folder, iteration=12):
    return torch.load(Path(folder, f"iter_{iteration}.pth"), weights_only=True)["state_dict"]


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.is_file())


def stop_and_resume(folder, stops, **settings):
    """Stop a run after each of some iterations and resume it; returns what each part trained on."""
    records = [Record(stop) for stop in (*stops, None)]
    for i, record in enumerate(records):
        with pytest.raises(KeyboardInterrupt) if record.stop_after else nullcontext():
            make(folder, record=record, resume=i > 0, **settings).train()
    return [record.seen for record in records]


def assert_same_weights(a, b, iteration=12):
    for name, value in weights(a, iteration).items():
        assert torch.equal(value, weights(b, iteration)[name]), name


@pytest.mark.parametrize(("seed", "workers"), [(3, 0), (3, 1), (None, 0)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, seed, workers, monkeypatch):
    # without a seed in the config the stopped run's own is found in its checkpoint
    drawn = iter([7, 8, 9] if seed is None else [])
    if seed is None:
        monkeypatch.setattr("mmengine.runner.utils.sync_random_seed", lambda: next(drawn))
    parts = stop_and_resume(tmp_path / "stopped", (5, 9), seed=seed, workers=workers)
    assert sorted(parts[2]) == list(range(8, 12))
    if not workers:  # 5 iterations, 5 from 4 on and 4 from 8 on, of 2 images; 3 evaluations of 7
        assert len(Noisy.loaded) == 2 * (5 + 5 + 4) + 3 * 7
    whole = Record()
    make(tmp_path / "whole", seed=seed or 7, record=whole, workers=workers).train()
    assert sorted(whole.seen) == list(range(12))
    assert len({str(batch) for batch in whole.seen.values()}) == 12
    assert all(batch == whole.seen[i] for part in parts for i, batch in part.items())
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def accumulating(counts):
    return dict(
        type="OptimWrapper", accumulative_counts=counts, optimizer=dict(type="AdamW", lr=1e-2)
    )


def test_an_accumulating_run_goes_on_as_if_nothing_had_happened(tmp_path):
    settings = dict(optim_wrapper=accumulating(2), iterations=13)
    make(tmp_path / "whole", **settings).train()
    stop_and_resume(tmp_path / "stopped", (7,), **settings)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped", 13)


@pytest.mark.parametrize(
    "changes",
    [
        dict(checkpoint=dict(interval=2, save_best=None)),
        dict(checkpoint=dict(interval=3, save_begin=2, save_best=None)),
        dict(checkpoint=dict(interval=3)),  # the best of evaluations every 4
    ],
)
def test_checkpoints_in_the_middle_of_an_accumulation_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="multiple of accumulative_counts=3"):
        make(tmp_path, optim_wrapper=accumulating(3), **changes).train()
    assert not list(tmp_path.rglob("*.pth"))


def test_the_samplers_own_seed_stays(tmp_path):
    record = Record()
    make(tmp_path, seed=1, record=record, sampler={**ENDLESS, "seed": 5}).train()
    trained = [row[0] for i in sorted(record.seen) for row in record.seen[i]]
    order = iter(InfiniteSampler(Noisy(), shuffle=True, seed=5))  # MMEngine's own
    assert trained == [next(order) for _ in range(24)]


def test_a_finished_run_is_validated_again(tmp_path):
    make(tmp_path).train()
    assert len(Score.scores) == 3
    make(tmp_path, resume=True).train()  # it may have been stopped before the last evaluation
    assert len(Score.scores) == 4
    assert (tmp_path / "best_mIoU_iter_12.pth").exists()  # written again, and not removed


def test_orders_that_cannot_be_found_again_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got DefaultSampler"):
        make(tmp_path, sampler=dict(type="DefaultSampler", shuffle=True)).train()


def test_old_checkpoints_go_last(tmp_path, monkeypatch):
    events, replace, remove = [], os.replace, LocalBackend.remove

    def replaced(source, target):
        replace(source, target)
        events.append(("write", Path(target).name))

    def removed(backend, path):
        remove(backend, path)
        events.append(("remove", Path(path).name))

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(LocalBackend, "remove", removed)
    make(tmp_path, checkpoint=dict(max_keep_ckpts=1)).train()
    assert events[:8] == [
        ("write", "iter_2.pth"),
        ("write", "last_checkpoint"),
        ("write", "iter_4.pth"),
        ("write", "last_checkpoint"),
        ("remove", "iter_2.pth"),
        ("write", "best_mIoU_iter_4.pth"),
        ("write", "iter_4.pth"),  # MMEngine notes the best one in it
        ("write", "last_checkpoint"),
    ]
    best = [event for event in events if "best" in event[1]][1:]
    assert best == [
        ("write", "best_mIoU_iter_8.pth"),
        ("remove", "best_mIoU_iter_4.pth"),
        ("write", "best_mIoU_iter_12.pth"),
        ("remove", "best_mIoU_iter_8.pth"),
    ]
    left = ["best_mIoU_iter_12.pth", "iter_12.pth", "last_checkpoint"]
    assert [name for name in names(tmp_path) if not name.endswith(".py")] == left
    assert Path((tmp_path / "last_checkpoint").read_text()) == tmp_path / "iter_12.pth"


def test_a_run_killed_before_it_removed_a_checkpoint_removes_it_resumed(tmp_path, monkeypatch):
    remove = WholeCheckpointHook._remove

    def killed(hook, path):
        if path.endswith("iter_4.pth"):
            raise KeyboardInterrupt
        remove(hook, path)

    with monkeypatch.context() as patch:
        patch.setattr(WholeCheckpointHook, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path).train()
    assert {"iter_4.pth", "iter_8.pth"} <= set(names(tmp_path))
    make(tmp_path, resume=True).train()
    kept = [name for name in names(tmp_path) if name.startswith("iter")]
    assert kept == ["iter_10.pth", "iter_12.pth"]


def test_a_lost_loss_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="since iteration 4"):
        make(tmp_path, model=Model(fail_at=(4,))).train()
    assert [name for name in names(tmp_path) if name.startswith("iter")] == ["iter_2.pth"]


def test_weights_without_value_are_not_saved(tmp_path):
    hooks = dict(checkpoint=dict(type="WholeCheckpointHook", by_epoch=False, interval=2))
    with pytest.raises(FloatingPointError, match=r"after iteration 4 the weights linear\.\w+ are"):
        make(tmp_path, model=Model(fail_at=(4,), fail="weights"), default_hooks=hooks).train()
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_2.pth")
    assert [name for name in names(tmp_path) if name.startswith("iter")] == ["iter_2.pth"]


@pytest.mark.parametrize(
    ("calls", "enabled", "stops"),
    [((3, 4, 6, 7), True, False), ((3, 4, 5), True, True), ((3,), False, True)],
)
def test_steps_that_a_scaler_skips_are_forgiven(tmp_path, calls, enabled, stops):
    runner = make(
        tmp_path,
        model=Model(fail_at=calls),
        default_hooks=dict(check_loss=dict(type="CheckLossHook", patience=2)),
    )
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    # AmpOptimWrapper needs a GPU
    runner.optim_wrapper.loss_scaler = SimpleNamespace(is_enabled=lambda: enabled)
    runner.optim_wrapper.update_params = lambda loss: None
    if stops:
        with pytest.raises(FloatingPointError, match="since iteration 3"):
            runner.train()
    else:
        runner.train()
