"""The trainer's parts: optimizer, data stream, checkpoints, evaluators, mixed precision."""

from __future__ import annotations

import itertools
import logging
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: see its own install guide")

from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator
from detectron2.utils import comm

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.checkpoint import CheckpointError
from diffbackbone.detectron2 import add_diffusion_config, datasets, engine
from diffbackbone.detectron2.checkpoint import Checkpointer
from diffbackbone.detectron2.solver import build_optimizer

pytest_plugins = ["detectron2_runs"]
pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")


def make_config(*options):
    cfg = get_cfg()
    add_diffusion_config(cfg)
    cfg.merge_from_list(list(options))
    return cfg


def test_optimizers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    common = ("SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.2)
    optimizer = build_optimizer(make_config(*common), model)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    options = (*common, "SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BETAS", (0.8, 0.9))
    optimizer = build_optimizer(make_config(*options), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(model[0].weight)] == 0.2
    assert decays[id(model[1].weight)] == 0.0
    assert {(g["lr"], g["betas"]) for g in optimizer.param_groups} == {(0.1, (0.8, 0.9))}


def test_layer_decay():
    model = DiffusionBackbone("tiny", blocks=(24,), out_channels=None, out_strides=None)
    optimizer = build_optimizer(
        make_config("SOLVER.LAYER_DECAY_RATE", 0.5, "SOLVER.BASE_LR", 1.0), model
    )
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for block in (24, 1):
        assert {rates[id(p)] for p in model.unet.module(block).parameters()} == {
            0.5 ** (25 - block)
        }


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_clipping_the_norm_of_all_gradients(name):
    model = torch.nn.Linear(3, 2)
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5)
    kind = "SOLVER.CLIP_GRADIENTS.CLIP_TYPE"
    optimizer = build_optimizer(
        make_config("SOLVER.OPTIMIZER", name, *clip, kind, "full_model"), model
    )
    model.weight.grad, model.bias.grad = torch.full((2, 3), 3.0), torch.full((2,), -3.0)
    optimizer.step()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(grads.norm(), torch.tensor(0.5))
    optimizer = build_optimizer(make_config("SOLVER.OPTIMIZER", name, *clip, kind, "value"), model)
    model.weight.grad = torch.full((2, 3), 3.0)
    optimizer.step()
    assert model.weight.grad.max() == 0.5


def test_mapper_takes_the_config():
    cfg = make_config("INPUT.LSJ.ENABLED", True, "INPUT.LSJ.SIZE", 96, "MODEL.MASK_ON", True)
    mapper = datasets.build_mapper(cfg, True)
    names = [type(a).__name__ for a in mapper.augmentations.augs]
    assert names == ["RandomFlip", "ResizeScale", "FixedSizeCrop"]
    assert mapper.recompute_boxes
    sides = set()
    for _ in range(40):
        data = T.AugInput(np.zeros((120, 80, 3), np.uint8))
        mapper.augmentations(data)
        sides.add(max(data.image.shape[:2]))
    assert max(sides) == 96  # cropped
    assert min(sides) < 60  # small ones are not padded
    cfg.INPUT.RANDOM_FLIP = "none"
    names = [type(a).__name__ for a in datasets.build_mapper(cfg, True).augmentations.augs]
    assert names == ["ResizeScale", "FixedSizeCrop"]
    cfg.INPUT.LSJ.ENABLED = False
    names = [type(a).__name__ for a in datasets.build_mapper(cfg, True).augmentations.augs]
    assert names == ["ResizeShortestEdge"]


def draw(record):
    """A mapper that shows what it was given and what it draws."""
    return record["id"], np.random.rand(), torch.rand(()).item()


def stream(count, workers=0, start_iter=0, seed=3, batch=2, size=7):
    loader = datasets.build_train_loader(
        [{"id": i} for i in range(size)],
        mapper=draw,
        total_batch_size=batch,
        num_workers=workers,
        seed=seed,
        start_iter=start_iter,
    )
    return list(itertools.islice(loader, count))


def test_the_stream_goes_on_where_it_was_left():
    whole = stream(12)
    assert stream(5, start_iter=7) == whole[7:]
    assert stream(12, workers=2) == whole
    assert stream(4, workers=1, start_iter=8) == whole[8:]
    assert stream(12, seed=4) != whole
    drawn = [value for batch in whole for _, *values in batch for value in values]
    assert len(set(drawn)) == len(drawn)
    for epoch in range(3):  # every image once an epoch
        ids = [sample[0] for batch in whole for sample in batch][7 * epoch : 7 * epoch + 7]
        assert sorted(ids) == list(range(7))


def test_processes_share_the_stream(monkeypatch):
    whole = [sample for batch in stream(6, batch=2) for sample in batch]
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        for module in (comm, datasets.comm):
            monkeypatch.setattr(module, "get_world_size", lambda: 2)
        monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 2)
        mine = [sample for batch in stream(3, batch=4) for sample in batch]
        assert mine == whole[rank::2]
        later = [sample for batch in stream(1, batch=4, start_iter=2) for sample in batch]
        assert later == mine[4:]
    with pytest.raises(AssertionError, match="must be divisible"):
        stream(1, batch=3)


def test_the_configs_sampler_is_taken():
    cfg = make_config(
        "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD", 0.5, "SOLVER.IMS_PER_BATCH", 3,
    )  # fmt: skip
    records = [{"annotations": [{"category_id": i % 2}]} for i in range(4)]
    settings = datasets.loader_settings(cfg, 11, records)
    assert isinstance(settings["sampler"], RepeatFactorTrainingSampler)
    assert settings["sampler"]._seed == 11
    assert settings["total_batch_size"] == 3


def test_a_mapper_may_refuse_images():
    records = [{"id": i} for i in range(5)]
    picky = datasets.SeededStream(records, lambda r: r if r["id"] == 3 else None, seed=0)
    assert picky[0, 3]["id"] == picky[1, 0]["id"] == 3


def test_evaluators(data, tmp_path, caplog, monkeypatch):
    cfg = make_config("OUTPUT_DIR", str(tmp_path))
    build = engine.Trainer.build_evaluator
    panoptic = "diffbackbone_sample_val_panoptic_separated"
    assert len(datasets.load_dicts(panoptic)) == 3
    with caplog.at_level(logging.WARNING):
        kinds = list(map(type, build(cfg, panoptic)._evaluators))
    assert kinds[:2] == [SemSegEvaluator, COCOEvaluator]
    assert "needs github.com/cocodataset/panopticapi" in caplog.text or len(kinds) == 3
    sample = "diffbackbone_sample_val"
    monkeypatch.setitem(vars(MetadataCatalog.get(sample)), "evaluator_type", "mine")
    assert list(map(type, build(cfg, sample)._evaluators)) == [COCOEvaluator]


def test_checkpoints_of_another_model(tmp_path):
    small = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    path = tmp_path / "model.pth"
    torch.save({"model": small.state_dict()}, path)
    wider = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3))
    Checkpointer(wider).load(str(path))  # a part fits: as Detectron2 users expect
    torch.testing.assert_close(wider[0].weight, small[0].weight)
    with pytest.raises(CheckpointError, match=r"shape of 1.weight: \(2, 2\), expected \(3, 2\)"):
        Checkpointer(wider, strict=True).load(str(path))
    longer = torch.nn.Sequential(*small, torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"missing: 2.bias"):
        Checkpointer(longer, strict=True).load(str(path))
    with pytest.raises(CheckpointError, match=r"unexpected: 1.weight"):
        Checkpointer(torch.nn.Sequential(small[0]), strict=True).load(str(path))
    with pytest.raises(CheckpointError, match="does not fit"):
        Checkpointer(torch.nn.ModuleDict({"x": torch.nn.Linear(2, 2)})).load(str(path))
    (tmp_path / "last_checkpoint").write_text("model.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        Checkpointer(wider, str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize("layout", ["detectron2", "blobs", "plain"])
def test_model_zoo_pickles(tmp_path, layout):
    model = torch.nn.Linear(2, 3)
    values = {"weight": np.arange(6, dtype=np.float32).reshape(3, 2), "bias": np.ones(3, "f4")}
    content = {
        "detectron2": {"model": dict(values), "__author__": "Detectron2"},
        "blobs": {"blobs": {**values, "weight_momentum": np.zeros(2)}},
        "plain": values,
    }[layout]
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    Checkpointer(model, strict=True).load(str(path))
    assert model.weight.tolist() == values["weight"].tolist()
    assert model.bias.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "content",
    [b"PK\3\4 half", {"model": {}}, {"model": [1.0]}, {3: 3.0},
     {"model": {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.ones(2)}}],
    ids=["zip", "empty", "list", "keys", "types"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pyth"])
def test_damaged_checkpoints(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save({"model_state": content} if suffix == ".pyth" else content, path)
    with pytest.raises(CheckpointError):
        Checkpointer(torch.nn.Linear(2, 2)).load(str(path))


def test_mixed_precision(monkeypatch, caplog):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    make = lambda **kwargs: engine.make_step_trainer(model, None, optimizer, **kwargs)  # noqa: E731
    assert type(make()) is SimpleTrainer
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert type(make(amp=True)) is SimpleTrainer
    assert "needs a GPU" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, dtype, wanted in (
        (True, "auto", torch.bfloat16),
        (False, "auto", torch.float16),
        (True, "float16", torch.float16),
    ):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        trainer = make(amp=True, dtype=dtype)
        assert isinstance(trainer, AMPTrainer)
        assert trainer.precision == wanted
        assert trainer.grad_scaler._enabled == (wanted == torch.float16)
