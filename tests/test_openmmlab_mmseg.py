"""The MMSegmentation adapter: registries, weights, optimizer groups, configs, official scripts."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import golden
import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed")
pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import diffbackbone.mmseg  # noqa: F401  registers

# isort: split
import mmseg
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry, init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from PIL import Image

from diffbackbone import CheckpointError, UNet, UNetConfig
from diffbackbone.openmmlab.backbone import DiffusionBackbone
from diffbackbone.openmmlab.checks import CheckInputsHook
from diffbackbone.sample_data.dataset import main as make_sample_data

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "mmseg"
SMALL = dict(
    model_channels=32,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    attention_strides=(4,),
    num_head_channels=32,
)
BACKBONE = dict(
    type="DiffusionBackbone", unet=SMALL, blocks=[12, 10], out_channels=32, out_strides=[4, 8]
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(golden.fill(UNet(UNetConfig(**SMALL))).state_dict(), path)
    return str(path)


@pytest.mark.parametrize(
    "registry", [MODELS, ROOT_MODELS, Registry("model", parent=ROOT_MODELS, scope="mmother")]
)
def test_every_registry_finds_the_backbone(registry):
    backbone = registry.build(dict(BACKBONE))
    assert isinstance(backbone, DiffusionBackbone)
    assert [x.shape for x in backbone(torch.zeros(1, 3, 50, 70))] == [
        (1, 32, 13, 18),
        (1, 32, 7, 9),
    ]


@pytest.mark.parametrize("form", ["init_cfg", "pretrained", "checkpoint"])
def test_weights_in_the_usual_forms(checkpoint, form):
    extra = {form: checkpoint}
    if form == "init_cfg":
        constant = dict(type="Constant", layer="Conv2d", val=7.0)
        extra = dict(init_cfg=[constant, dict(type="Pretrained", checkpoint=checkpoint)])
    backbone = MODELS.build({**BACKBONE, **extra})
    first = backbone.unet.input_blocks[0][0].weight
    expected = torch.load(checkpoint, weights_only=True)["input_blocks.0.0.weight"]
    assert not torch.equal(first, expected)  # as everywhere in MMEngine, init_weights() loads
    backbone.init_weights()
    assert torch.equal(first, expected)
    assert (backbone.proj[0].weight == 7).all() == (form == "init_cfg")
    with torch.no_grad():
        first.zero_()
    backbone.init_weights()  # once is enough
    assert (first == 0).all()


def test_pretrained_of_the_segmentor_reaches_the_backbone(checkpoint):
    cfg = shrunken("upernet_gd_sample")
    cfg.model.pretrained = checkpoint
    cfg.model.backbone.update(unet=SMALL, blocks=[12, 12, 10, 10])
    model = MODELS.build(cfg.model)
    model.init_weights()
    expected = torch.load(checkpoint, weights_only=True)["input_blocks.0.0.weight"]
    assert torch.equal(model.backbone.unet.input_blocks[0][0].weight, expected)


def test_random_weights_are_announced_and_missing_ones_an_error(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(
        "diffbackbone.openmmlab.backbone.print_log", lambda text, **kwargs: logged.append(text)
    )
    MODELS.build(dict(BACKBONE)).init_weights()
    assert "RANDOM" in logged[-1]
    with pytest.raises(FileNotFoundError):
        MODELS.build({**BACKBONE, "pretrained": str(tmp_path / "gone.pt")}).init_weights()
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError):
        MODELS.build({**BACKBONE, "pretrained": str(tmp_path / "other.pt")}).init_weights()


def shrunken(name: str) -> Config:
    """A config with the U-Net made small, everything else as it stands."""
    init_default_scope("mmseg")
    cfg = Config.fromfile(str(CONFIGS / f"{name}.py"))
    cfg.model.backbone.unet = dict(preset="tiny")
    cfg.model.backbone.init_cfg = None
    for key in ("decode_head", "auxiliary_head"):
        cfg.model[key].channels = 32
    return cfg


def samples(sizes, classes=150):
    result = []
    for height, width in sizes:
        labels = torch.randint(0, classes, (1, height, width))
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        shape = dict(img_shape=(height, width), ori_shape=(height, width), seg_map_path="a.png")
        sample.set_metainfo({**shape, "reduce_zero_label": True})
        result.append(sample)
    return result


GD = ["upernet_gd_t90_b24_ade20k", "upernet_gd_t90_b33-30-27-24_ade20k", "upernet_difffeed_ade20k"]


@pytest.mark.parametrize("name", [*GD[1:], "upernet_gd_sample"])
def test_configs_train_and_predict(name):
    cfg = shrunken(name)
    model = MODELS.build(cfg.model)
    classes = cfg.model.decode_head.num_classes
    model.data_preprocessor.size = (64, 64)
    inputs = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    data = dict(inputs=inputs, data_samples=samples([(64, 64)] * 2, classes))
    model.train()
    loss, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode="loss"))
    loss.backward()
    assert torch.isfinite(loss)
    build_optim_wrapper(model, cfg.optim_wrapper).step()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    model.eval()
    bgr = torch.tensor([0, 127, 255], dtype=torch.uint8)[:, None, None].expand(3, 50, 61)
    odd = dict(inputs=[bgr], data_samples=samples([(50, 61)], classes))
    arrived = model.data_preprocessor(odd, False)["inputs"]
    assert arrived[0, :, 0, 0].tolist() == pytest.approx([1, -1 / 255, -1], abs=1e-6)
    with torch.no_grad():
        (result,) = model.test_step(odd)
    assert result.pred_sem_seg.data.shape == (1, 50, 61)


@pytest.mark.parametrize("name", GD)
def test_paper_settings(name):
    cfg = Config.fromfile(str(CONFIGS / f"{name}.py"))
    backbone = cfg.model.backbone
    assert (backbone.unet, backbone.timestep) == ("gd256_uncond", 90)
    assert backbone.blocks == ([24] * 4 if "b24" in name else [33, 30, 27, 24])
    assert backbone.get("feedback") == ("bottleneck" if "difffeed" in name else None)
    assert (backbone.out_channels, backbone.out_strides) == (1024, [4, 8, 16, 32])
    assert cfg.model.decode_head.channels == 1024
    assert cfg.model.test_cfg == dict(mode="slide", crop_size=(512, 512), stride=(341, 341))
    assert (cfg.optim_wrapper.optimizer.type, cfg.optim_wrapper.optimizer.lr) == ("AdamW", 2e-5)
    assert Config.fromfile(str(CONFIGS / f"{name}_160k.py")).model == cfg.model


def optimizer_settings(model, **paramwise_cfg):
    wrapper = build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.5),
            constructor="DiffusionOptimWrapperConstructor",
            paramwise_cfg=paramwise_cfg,
        ),
    )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = wrapper.optimizer.param_groups
    settings = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(settings) == sum(len(g["params"]) for g in groups)
    return settings, len(groups)


def segmentor(**kwargs):
    parts = dict(backbone=MODELS.build({**BACKBONE, **kwargs}), head=torch.nn.Conv2d(32, 5, 1))
    return torch.nn.ModuleDict(parts)


def test_layer_decay_and_no_decay_rules():
    model = segmentor(feedback="bottleneck")
    settings, groups = optimizer_settings(
        model, layer_decay_rate=0.5, norm_decay_mult=0.0, bias_decay_mult=0.0
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(settings) == trained
    last = 12
    assert settings["head.weight"] == (1, 0.5)
    assert settings["head.bias"] == (1, 0)
    assert settings["backbone.proj.0.weight"] == (1, 0.5)
    assert settings["backbone.feedback.8.1.weight"] == (1, 0)
    assert settings["backbone.unet.input_blocks.0.0.weight"] == (0.5**last, 0.5)
    assert settings["backbone.unet.input_blocks.1.0.in_layers.0.weight"] == (0.5 ** (last - 1), 0)
    assert settings["backbone.unet.middle_block.0.in_layers.2.weight"] == (0.5 ** (last - 6), 0.5)
    assert settings["backbone.unet.output_blocks.4.0.in_layers.2.weight"] == (0.5, 0.5)
    assert settings["backbone.unet.time_embed.0.weight"] == (0.5 ** (last + 1), 0.5)
    assert groups < 40  # not one for each parameter
    plain, _ = optimizer_settings(model, custom_keys={"backbone.unet": dict(lr_mult=0.1)})
    assert plain["backbone.unet.input_blocks.0.0.weight"] == (0.1, 0.5)
    assert plain["head.weight"] == (1, 0.5)
    for rate, wrong in ((1.5, model), ("half", model), (0.5, torch.nn.Linear(1, 1))):
        with pytest.raises(ValueError, match="layer decay rate"):
            optimizer_settings(wrong, layer_decay_rate=rate)


def test_frozen_weights_are_not_given_to_the_optimizer():
    settings, _ = optimizer_settings(segmentor(freeze=True), norm_decay_mult=0.0)
    assert not any("unet" in name for name in settings)
    assert any("proj" in name for name in settings)


# --------------------------------------------------------------------------------------------------
# labels


def check(labels=(0,), pad=255, ignored=255):
    """Check the labels of a segmentor of 11 classes whose decode head ignores one label."""
    model = shrunken("upernet_gd_sample").model
    for head in (model.decode_head, model.auxiliary_head):
        head.ignore_index = ignored
    model.data_preprocessor.update(seg_pad_val=pad, size=(64, 64))
    runner, hook = SimpleNamespace(model=MODELS.build(model)), CheckInputsHook()
    batch = dict(
        inputs=[torch.zeros(3, 50, 64, dtype=torch.uint8)] * 2,
        data_samples=samples([(50, 64)] * 2, 11),
    )
    for i, label in enumerate(labels):
        batch["data_samples"][1].gt_sem_seg.data[0, i] = label
    hook.before_train_iter(runner, 0, batch)
    padded = runner.model.data_preprocessor(batch, True)
    assert all(torch.isfinite(x) for x in runner.model(**padded, mode="loss").values())


@pytest.mark.parametrize("ignored", [254, -100])
def test_the_head_says_which_label_is_left_out(ignored):
    check(labels=(10, ignored), pad=ignored, ignored=ignored)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(labels=(-1,)), "label -1 in a.png"),
        (dict(labels=(11, 255)), "label 11 in a.png"),
        (dict(labels=(255,), pad=254, ignored=254), "label 255"),
        (dict(pad=255, ignored=254), "label 255 in data_preprocessor.seg_pad_val"),
    ],
)
def test_labels_without_a_class_stop_the_run(settings, message):
    with pytest.raises(ValueError, match=message):
        check(**settings)


# --------------------------------------------------------------------------------------------------
# scripts

SCRIPTS = """
_base_ = "{base}"
model = dict(backbone=dict(freeze=True, save_frozen=False, activation_checkpointing=True))
loader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root="{data}"))
train_dataloader = dict(batch_size=2, **loader)
val_dataloader = loader
test_dataloader = loader
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(checkpoint=dict(interval=2))
custom_hooks = [dict(type="EMAHook", begin_iter=2, update_buffers=True)]
"""


def test_checkpoints_without_frozen_weights(tmp_path, monkeypatch):
    """The official scripts train and evaluate; ours resume and draw."""
    log, data, config = tmp_path / "log", tmp_path / "data", tmp_path / "config.py"
    make_sample_data(["--out", str(data), "--train", "6", "--val", "3", "--unlabelled", "0"])
    base = CONFIGS / "upernet_gd_sample.py"
    config.write_text(SCRIPTS.format(base=base, data=data / "ADEChallengeData2016"))
    official, run, resumed = Path(mmseg.__file__).parent / ".mim/tools", tmp_path / "run", "resumed"
    outputs = [forked.run(official / "train.py", config, "--work-dir", run, log=log)]
    weights = run / "iter_4.pth"
    outputs.append(forked.run(official / "test.py", config, weights, "--work-dir", run, log=log))
    again = ["--work-dir", tmp_path / resumed, "--resume"]
    load = ["--cfg-options", f"load_from={run / 'iter_2.pth'}"]
    outputs.append(forked.run("tools/mmseg_train.py", config, *again, *load, log=log))
    state, other = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (weights, tmp_path / resumed / "iter_4.pth")
    )
    assert not any("backbone.unet." in key for key in state)
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    scores = [re.findall(r"mIoU: (\S+)", output) for output in outputs]
    assert scores[0]
    assert scores[0] == scores[1] == scores[2]

    picture = tmp_path / "picture.png"
    options = ["--images", "2", "--cfg-options", "model.test_cfg.mode=whole"]
    command = ["mmseg_visualize.py", str(config), str(weights), "--out", str(picture), *options]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / "tools" / command[0]), run_name="__main__")
    with Image.open(picture) as image:
        assert image.width > 1000
        assert len(set(image.convert("RGB").getdata())) > 500  # photographs, not a blank page
