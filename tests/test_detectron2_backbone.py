"""The Detectron2 adapter: real models, any image sizes, empty targets, frozen and trained."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: see its own install guide")

from detectron2 import model_zoo
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.analysis import find_unused_parameters
from detectron2.utils.events import EventStorage

import diffbackbone
from diffbackbone.detectron2 import (
    DiffusionBackbone,
    DiffusionFPN,
    DiffusionSimpleFeaturePyramid,
    add_diffusion_config,
)
from diffbackbone.detectron2.backbone import content_sizes
from diffbackbone.models.guided_diffusion import UNet

SFP, FPN, TAPS = (f"build_diffusion_{kind}backbone" for kind in ("sfp_", "fpn_", ""))
BLOCKS = {SFP: (24,), FPN: (30, 27, 24, 21), TAPS: (30, 24)}
ZOO = {
    "GeneralizedRCNN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "PanopticFPN": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM", "ignore:.*meshgrid")


def make_config(builder=SFP, meta="GeneralizedRCNN", **keys):
    """A config as users make it: one of Detectron2's, with our backbone put in."""
    cfg = get_cfg()
    add_diffusion_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(ZOO[meta]))
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [127.5] * 3
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.DIFFUSION.UNET = "tiny"
    cfg.MODEL.DIFFUSION.BLOCKS = BLOCKS[builder]
    cfg.MODEL.FPN.IN_FEATURES = []
    cfg.MODEL.FPN.NORM = "LN"
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    if meta == "RetinaNet":
        cfg.MODEL.DIFFUSION.BLOCKS, cfg.MODEL.DIFFUSION.TOP_BLOCK = (27, 24, 21), "p6p7"
        cfg.MODEL.RETINANET.NUM_CONVS = 1
    for key, value in keys.items():
        cfg.MODEL.DIFFUSION[key] = value
    return cfg


def make_backbone(builder=SFP, **keys):
    torch.manual_seed(0)
    return fill(build_backbone(make_config(builder, **keys)))


def fill(model):
    """Weights under which no branch is zero: a fresh U-Net's residual branches are."""
    for module in model.modules():
        if isinstance(module, UNet):
            for value in module.parameters():
                if value.ndim > 1 and not value.any():
                    torch.nn.init.normal_(value, std=0.05)
    return model


def pictures(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, h, w), generator=generator).float() for h, w in sizes]


def normalize(images):
    return ImageList.from_tensors([(x - 127.5) / 127.5 for x in images], 32).tensor


def samples(*sizes, instances=2):
    """Model inputs with random targets; ``instances`` for all images or for each."""
    counts = instances if isinstance(instances, tuple) else (instances,) * len(sizes)
    out = []
    for image, count in zip(pictures(*sizes), counts):
        height, width = image.shape[1:]
        target = Instances((height, width))
        corner = torch.rand(count, 2) * 40
        target.gt_boxes = Boxes(torch.cat([corner, corner + 20 + torch.rand(count, 2) * 40], 1))
        target.gt_classes = torch.arange(count) % 5
        target.gt_masks = BitMasks(torch.rand(count, height, width) > 0.5)
        sem_seg = torch.randint(0, 5, (height, width))
        out.append({"image": image, "instances": target, "sem_seg": sem_seg})
    return out


def train_step(model, inputs):
    model.train()
    with EventStorage():
        losses = model(inputs)
    assert losses
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("builder", [SFP, FPN, TAPS])
def test_maps_have_the_shapes_that_are_promised(builder):
    backbone = make_backbone(builder, FEEDBACK="windowed")
    names = {TAPS: ["b30", "b24"]}.get(builder, ["p2", "p3", "p4", "p5", "p6"])
    shapes = backbone.output_shape()
    assert list(shapes) == names
    for height, width in [(64, 96), (50, 75)]:
        maps = backbone(normalize(pictures((height, width)))[..., :height, :width])
        assert list(maps) == names
        for name, x in maps.items():
            stride = shapes[name].stride
            assert x.shape == (1, shapes[name].channels, -(-height // stride), -(-width // stride))


def test_taps_are_the_core_backbones():
    backbone = make_backbone(TAPS, OUT_CHANNELS=8, OUT_STRIDES=(4, 8), TIMESTEP=33, SEED=5).eval()
    core = diffbackbone.DiffusionBackbone(
        "tiny", None, 33, (30, 24), out_channels=8, out_strides=(4, 8), seed=5
    ).eval()
    core.load_state_dict(backbone.state_dict())
    images = normalize(pictures((70, 90)))
    maps = backbone(images)
    assert list(maps) == ["b30", "b24"]
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 8]
    core_images = diffbackbone.padding.pad_to_multiple(images[..., :70, :90], 32)
    for x, y in zip(maps.values(), core(core_images)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("builder", [SFP, FPN])
def test_what_shares_a_batch_changes_nothing(builder):
    backbone = make_backbone(builder, FEEDBACK="bottleneck").eval()
    images = pictures((70, 90), (64, 33), (33, 120), (70, 90))
    with torch.no_grad():
        together = backbone(normalize(images))
        for i, image in enumerate(images):
            alone = backbone(normalize([image]))
            for name, x in alone.items():
                y = together[name][i : i + 1, :, : x.shape[2], : x.shape[3]]
                assert (x - y).abs().max() <= 1e-5 * x.abs().max(), name


def test_batches_run_by_size(monkeypatch):
    backbone = make_backbone(TAPS).eval()
    seen = []
    run = backbone._named_maps
    monkeypatch.setattr(backbone, "_named_maps", lambda x: seen.append(tuple(x.shape)) or run(x))
    backbone(normalize(pictures((70, 90), (128, 64), (70, 90))))
    assert sorted(seen) == [(1, 3, 128, 64), (2, 3, 96, 96)]


def test_padding_policies():
    images = pictures((70, 90), (128, 128))
    batch = normalize(images)
    mirrored = batch.clone()
    mirrored[0] = diffbackbone.padding.pad_to_size(batch[:1, :, :70, :90], 128, 128)[0]
    maps = {}
    for padding in ("separate", "reflect", "keep"):
        backbone = make_backbone(TAPS, PADDING=padding).eval()
        with torch.no_grad():
            maps[padding] = backbone(batch)["b24"]
            if padding == "reflect":
                torch.testing.assert_close(maps[padding], backbone(mirrored)["b24"])
    for a, b in itertools.combinations(maps.values(), 2):
        assert (a[0] - b[0]).abs().max() > 1e-3
        torch.testing.assert_close(a[1], b[1])  # the image that fills the batch


def test_content_sizes():
    images = torch.zeros(4, 3, 6, 8)
    images[0, 1, 2, 3] = 0.5  # the last pixel that is not zero
    images[1] = 1
    images[2, 0, 5, 0] = float("nan")
    assert content_sizes(images) == [(3, 4), (6, 8), (6, 1), (6, 8)]


def test_synchronized_norms_run_once_for_all(monkeypatch):
    backbone = make_backbone(TAPS, FEEDBACK="windowed")
    assert backbone._effective_padding() == "separate"
    backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert backbone.train()._effective_padding() == "reflect"
    assert backbone.eval()._effective_padding() == "separate"


@pytest.mark.parametrize("instances", [(0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize(
    ("meta", "builder", "feedback"),
    [
        ("GeneralizedRCNN", SFP, "bottleneck"),
        ("GeneralizedRCNN", FPN, ""),
        ("RetinaNet", FPN, ""),
        ("PanopticFPN", FPN, ""),
    ],
)
def test_any_size_through_whole_models(meta, builder, feedback, instances):
    model = build_model(make_config(builder, meta, FEEDBACK=feedback))
    sizes = ((100, 70), (64, 121))
    train_step(model, samples(*sizes, instances=instances))
    model.eval()
    with torch.no_grad():
        results = model(samples(*sizes))
    assert [r["instances"].image_size for r in results] == list(sizes)
    if meta == "PanopticFPN":
        assert [r["sem_seg"].shape[1:] for r in results] == list(sizes)


@pytest.mark.parametrize(
    ("builder", "keys"),
    [(SFP, {}), (FPN, {}), (SFP, {"FEEDBACK": "bottleneck"}), (FPN, {"FREEZE": True})],
    ids=str,
)
def test_no_parameter_is_unused(builder, keys):
    model = fill(build_model(make_config(builder, **keys)))
    with EventStorage():
        unused = find_unused_parameters(model, samples((100, 70), (64, 96)))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not set(unused) & set(trained)
    if not keys:  # frozen weights and those of DifFeed's first pass count as unused there
        assert not unused
    train_step(model, samples((100, 70), (64, 96)))
    inside = [p for name, p in trained.items() if ".unet." in name]
    assert bool(inside) is not bool(keys.get("FREEZE"))
    assert all(p.grad.any() for p in inside)


def test_lazy_config_classes():
    net = LazyCall(DiffusionBackbone)(
        unet={"preset": "tiny", "dropout": 0.1}, blocks=[27, 24], feedback={24: 14}, timestep=10
    )
    fpn = instantiate(LazyCall(DiffusionFPN)(bottom_up=net, out_channels=16, norm=""))
    assert {n: s.stride for n, s in fpn.output_shape().items()} == {"p3": 8, "p4": 16}
    assert fpn.bottom_up.feedback.mapping == {24: 14}
    assert fpn.bottom_up.unet.config.dropout == 0.1
    net.blocks = [24]
    sfp = instantiate(
        LazyCall(DiffusionSimpleFeaturePyramid)(
            net=net, scale_factors=(2.0, 1.0), top_block=LazyCall(LastLevelMaxPool)()
        )
    )
    assert {n: s.stride for n, s in sfp.output_shape().items()} == {"p3": 8, "p4": 16, "p5": 32}


def test_fpn_takes_taps_in_any_order_and_any_top():
    cfg = make_config(TAPS, BLOCKS=(24, 27))
    fpn = DiffusionFPN(build_backbone(cfg), out_channels=8, top_block=LastLevelMaxPool())
    assert {n: s.stride for n, s in fpn.output_shape().items()} == {"p3": 8, "p4": 16, "p5": 32}
    maps = fpn(torch.rand(1, 3, 64, 64) - 0.5)
    torch.testing.assert_close(maps["p5"], maps["p4"][..., ::2, ::2])


def test_keys_reach_the_backbone():
    cfg = make_config(
        TAPS, FEEDBACK_MAP=((24, 14), (21, 14)), TIMESTEP=3, NOISE="none", FREEZE=True, SEED=9,
        FIRST_PASS_GRAD=True, ACTIVATION_CHECKPOINTING=True, PADDING="keep",
    )  # fmt: skip
    cfg.MODEL.DIFFUSION.UNET_OPTIONS.num_classes = 7
    cfg.MODEL.DIFFUSION.CLASS_LABEL = 6
    backbone = build_backbone(cfg)
    assert backbone.feedback.mapping == {24: 14, 21: 14}
    assert backbone.feedback.first_pass_grad
    assert (backbone.timestep, backbone.noise, backbone.seed) == (3, "none", 9)
    assert backbone.frozen
    assert backbone.unet.activation_checkpointing
    assert backbone.class_label == 6
    assert backbone.padding == "keep"
    assert not backbone.save_frozen


@pytest.mark.parametrize(
    ("builder", "keys"),
    [
        (SFP, {"BLOCKS": (33,)}),  # stride 2
        (SFP, {"BLOCKS": (27, 24)}),
        (FPN, {"BLOCKS": (33, 27, 24)}),  # strides that don't double
        (FPN, {"TOP_BLOCK": "p5"}),
        (TAPS, {"FEEDBACK": "some"}),
        (TAPS, {"PADDING": "zero"}),
    ],
    ids=str,
)
def test_wrong_values(builder, keys):
    with pytest.raises((ValueError, AssertionError, KeyError)):
        build_backbone(make_config(builder, **keys))


@pytest.mark.parametrize(
    ("key", "value"), [("MODEL.PIXEL_MEAN", [103.5, 116.0, 123.0]), ("INPUT.FORMAT", "BGR")]
)
def test_other_pixels_are_refused(key, value):
    cfg = make_config()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=r"RGB in \[-1, 1\]"):
        build_backbone(cfg)
