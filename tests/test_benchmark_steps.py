"""Whole training steps of small models. No time is asserted."""

from __future__ import annotations

import importlib
import json

import in_process
import pytest
import torch
from image_folders import write_weights
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from diffbackbone import DiffusionBackbone
from diffbackbone.benchmark import timing, training, worker
from diffbackbone.benchmark.config import STEPS, BenchmarkConfig, Case
from diffbackbone.benchmark.training import TrainingStep

FAST = {"unet": "tiny", "head_channels": 16, "device": "cpu", "repeats": 1}


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    backends = torch.backends.cudnn
    monkeypatch.setattr(backends, "benchmark", backends.benchmark)


@pytest.fixture(params=["upernet", "mask_rcnn"])
def model(request):
    pytest.importorskip({"upernet": "mmseg", "mask_rcnn": "detectron2"}[request.param])
    return request.param


@pytest.fixture
def module(model):
    return importlib.import_module(f"diffbackbone.benchmark.{model}")


def case(model, mode="finetuned", size=64, batch=2, dtype="float32"):
    return Case(model, size, batch, dtype, mode)


def test_every_kind_of_row(model, tmp_path, monkeypatch):
    in_process.use(monkeypatch.setattr)
    monkeypatch.setattr(worker, "MIN_SECONDS", 0)
    names = (model, f"{model}_difffeed")
    config = BenchmarkConfig(**FAST, cases=names, sizes=(32,))
    rows = timing.run(config, tmp_path / "steps", {"steps": config.plan()})
    kinds = [(row.case.name, row.case.mode) for row in rows.values()]
    assert kinds == [(name, mode) for name in names for mode in ("frozen", "finetuned")]
    flops = {}
    for kind, row in zip(kinds, rows.values()):
        assert (row.status, row.message) == ("ok", "")
        assert (row.case.size, row.case.batch) == (32, {"upernet": 2, "mask_rcnn": 1}[model])
        result = row.results["ours"]
        seconds, flops[kind] = result["seconds"], result["flops"]
        assert set(seconds) == {"step", "forward", "backward", "optimizer"}
        assert (seconds["backward"] == 0) == (kind == (model, "frozen"))
        assert all(value > 0 for part, value in seconds.items() if part != "backward")
        assert sum(seconds.values()) < 2 * seconds["step"]
        assert 1e6 < result["peak_bytes"] < 2e9
    for name in names:
        assert 1.2 * flops[name, "frozen"] < flops[name, "finetuned"]
    for mode in ("frozen", "finetuned"):
        assert flops[model, mode] < flops[f"{model}_difffeed", mode]
    seconds = next(iter(rows.values())).results["ours"]["seconds"]
    text = (tmp_path / "steps.md").read_text()
    assert f"{seconds['step']:.4g} (U-Net {seconds['forward']:.3g} + 0" in text
    assert f"| {1 - seconds['forward'] / seconds['step']:.0%} |" in text
    assert len(json.loads((tmp_path / "steps.json").read_text())["rows"]) == 4


@pytest.mark.parametrize("mode", ["frozen", "finetuned"])
def test_what_a_step_changes(module, model, tmp_path, mode):
    """The weights that are trained; and the heads are done when the U-Net's backward begins."""
    step = module.build("ours", case(f"{model}_difffeed", mode), BenchmarkConfig(**FAST), tmp_path)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    trained = {name for name, p in step.model.named_parameters() if p.requires_grad}
    arrived = {}
    for name, parameter in step.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: arrived.update({name: len(step.marks["backward"])})
            )
    held = {}

    def spy(optimizer, *_):
        held.update({id(p): group for group in optimizer.param_groups for p in group["params"]})
        optimizer.param_groups[0]["lr"] = 1e-2

    handle = register_optimizer_step_pre_hook(spy)
    step.step()
    handle.remove()
    changed = {n for n, p in step.model.named_parameters() if not torch.equal(before[n], p)}
    unet = {name for name in before if ".unet." in name}
    layers = {name for name in before if ".feedback." in name}
    heads = before.keys() - unet - layers
    assert bool(changed & unet) == (mode == "finetuned")
    assert len(changed & layers) >= 0.6 * len(layers) > 0
    assert len(changed & heads) > 0.6 * len(heads)
    assert step.model.training
    groups = {name: held.get(id(p)) for name, p in step.model.named_parameters()}
    assert {name for name, group in groups.items() if group} == trained
    decays = {group["weight_decay"] for group in groups.values() if group}
    assert decays == ({0.05, 0.0} if model == "upernet" else {0.1, 0.0})  # the configs'
    inside = {name for name in arrived if name in unet | layers}
    assert {arrived[name] for name in inside} == {1}
    assert {arrived[name] for name in arrived.keys() - inside} == {0}


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_parts_of_a_step(monkeypatch, feedback, frozen):
    now = [0.0]

    def take(seconds):
        now[0] += seconds

    class Take(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forward, backward):
            take(forward)
            ctx.seconds = backward
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            take(ctx.seconds)
            return grad, None, None

    weight, head = (nn.Parameter(torch.ones(2), requires_grad=x) for x in (not frozen, True))

    class Passes(nn.Module):
        def forward(self, x):
            early = Take.apply(x * weight, 1.0, 2.0)
            return {24: Take.apply(early, 4.0, 8.0), 21: early}

        forward_features = forward

    class Backbone(DiffusionBackbone):
        def __init__(self):
            nn.Module.__init__(self)
            self.unet, self.feedback = Passes(), Passes() if feedback else None

    backbone = Backbone()
    optimizer = torch.optim.SGD([head, *([] if frozen else [weight])])

    def update():
        take(16.0)
        taps = (backbone.feedback or backbone.unet.forward_features)(torch.ones(2))
        sum(Take.apply(x * head, 32.0, 64.0).sum() for x in taps.values()).backward()
        take(128.0)
        optimizer.step()

    monkeypatch.setattr(training, "timer", lambda: now[0])
    step = TrainingStep(backbone, optimizer, update, "float32")
    optimizer.register_step_pre_hook(lambda *_: take(256.0))  # within the marks
    backward = 0.0 if frozen else 10.0
    expected = {"forward": 5.0, "backward": backward, "optimizer": 256.0}
    expected["step"] = 16 + 5 + 2 * 32 + 2 * 64 + backward + 128 + 256
    for _ in range(2):
        assert step.step() == pytest.approx(expected)


def test_defaults_are_those_of_the_configs(module, model):
    config = BenchmarkConfig(device="cpu")
    _, size, batch = STEPS[model]
    plain, difffeed = (
        module.read_config(case(name, size=size), config) for name in (model, f"{model}_difffeed")
    )
    for cfg, feedback in ((plain, None), (difffeed, "bottleneck")):
        if model == "upernet":
            assert (cfg.train_dataloader.batch_size, cfg.model.data_preprocessor.size) == (
                batch,
                (size, size),
            )
            assert cfg.model.backbone.get("feedback") == feedback
            assert cfg.model.decode_head.channels == 1024
        else:
            assert (size, batch) == (cfg.INPUT.LSJ.SIZE, 1)  # four GPUs with one image each
            assert (feedback or "") == cfg.MODEL.DIFFUSION.FEEDBACK
            assert cfg.MODEL.FPN.OUT_CHANNELS == 256
            assert cfg.MODEL.ROI_BOX_HEAD.FC_DIM == 1024


def test_options_reach_the_model(module, model, tmp_path):
    path = write_weights(tmp_path / "weights.pt")
    options = {**FAST, "head_channels": 48, "checkpoint": str(path)}
    config = BenchmarkConfig(**options, activation_checkpointing=False)
    step = module.build("ours", case(model, size=96, batch=3), config, tmp_path)
    (backbone,) = (m for m in step.model.modules() if isinstance(m, DiffusionBackbone))
    weights = torch.load(path)
    assert all(torch.equal(weights[key], x) for key, x in backbone.unet.state_dict().items())
    assert not backbone.unet.activation_checkpointing
    given = []
    forward = step.model.forward
    step.model.forward = lambda inputs, *rest, **kwargs: (
        given.append(inputs) or forward(inputs, *rest, **kwargs)
    )
    step.step()
    (inputs,) = given
    if model == "upernet":
        assert tuple(inputs.shape) == (3, 3, 96, 96)
        assert step.model.decode_head.channels == step.model.auxiliary_head.channels == 48
        assert backbone.channels[0] == 48
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in step.model.modules())
        return
    assert [tuple(sample["image"].shape) for sample in inputs] == [(3, 96, 96)] * 3
    heads = step.model.roi_heads
    assert heads.box_head.conv1.out_channels == heads.mask_head.deconv.out_channels == 48
    instances = inputs[0]["instances"]
    boxes = instances.gt_boxes.tensor
    assert len(instances) == 8
    assert 0 <= boxes.min() <= boxes.max() <= 96
    assert torch.allclose(instances.gt_masks.get_bounding_boxes().tensor, boxes, atol=1e-3)


def test_mixed_precision_is_the_framework_s(module, model):
    cfg = module.read_config(case(model, dtype="bfloat16"), BenchmarkConfig(device="cpu"))
    if model == "upernet":
        assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == ("AmpOptimWrapper", "bfloat16")
        assert cfg.optim_wrapper.constructor == "DiffusionOptimWrapperConstructor"
    else:
        assert dict(cfg.SOLVER.AMP) == {"ENABLED": True, "DTYPE": "bfloat16"}
