"""The backbone's contract: shapes, sizes, determinism, freezing, gradients, clear errors."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import warnings

import golden
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffbackbone import CheckpointError, DiffusionBackbone, UNet, UNetConfig
from diffbackbone.checks import _warn_unit_range
from diffbackbone.diffusion import coordinate_noise
from diffbackbone.padding import pad_to_multiple

SMALL = golden.CONFIGS["narrow256"]
pytestmark = pytest.mark.filterwarnings("ignore:.*weights are RANDOM")


def build(unet=SMALL, **kwargs) -> DiffusionBackbone:
    kwargs.setdefault("out_channels", 48)
    return golden.fill(DiffusionBackbone(unet, **kwargs))


def images(n=1, height=64, width=96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    smooth = torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear").clamp(-1, 1)


SIZES = [(32, 32), (32, 201), (33, 47), (64, 96)]


@pytest.mark.parametrize("size", SIZES)
def test_any_size_gives_the_promised_maps(size):
    backbone = build(feedback="bottleneck")
    with torch.no_grad():
        maps = backbone(images(2, *size))
    assert backbone.channels == (48,) * 4
    assert backbone.strides == (4, 8, 16, 32)
    for x, channels, stride in zip(maps, backbone.channels, backbone.strides):
        assert x.shape == (2, channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        assert x.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_raw_taps_keep_channels_and_strides(size):
    backbone = build(out_channels=None, out_strides=None, blocks=(33, 19, 1))
    table = UNetConfig.from_preset("gd256_uncond").blocks
    assert backbone.strides == tuple(table[b].stride for b in (33, 19, 1))
    with torch.no_grad():
        maps = backbone(images(1, *size))
        taps = backbone.forward_taps(images(1, *size), timesteps=(90, 300), blocks=(19, 33, 5))
    for x, stride, channels in zip(maps, backbone.strides, backbone.channels):
        assert x.shape[1:] == (channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert list(taps) == [(t, b) for t in (90, 300) for b in (19, 33, 5)]
    assert torch.equal(taps[90, 33], maps[0])
    assert not torch.allclose(taps[300, 33], maps[0])


def test_512_model_has_stride_64():
    with torch.device("meta"):
        backbone = DiffusionBackbone("gd512", blocks=(25,), out_strides=None)
    assert (backbone.size_divisibility, backbone.strides) == (64, (32,))


def test_padding_reflects_and_cropping_undoes_it():
    x = torch.arange(5.0).expand(1, 1, 3, 5)
    padded = pad_to_multiple(x, 8)
    assert padded.shape == (1, 1, 8, 8)
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert torch.equal(padded[..., :3, :5], x)
    assert pad_to_multiple(padded, 8) is padded

    backbone = build(noise="none")
    small = images(1, 50, 90)
    with torch.no_grad():
        direct = backbone(pad_to_multiple(small, 32))
        cropped = backbone(small)
    for whole, x in zip(direct, cropped):
        assert torch.equal(whole[..., : x.shape[-2], : x.shape[-1]], x)


def test_noise_policies():
    image = images()
    small = {"blocks": (5,), "out_strides": (8,)}
    fixed, fresh, none = (build(noise=noise, **small) for noise in ("fixed", "random", "none"))
    with torch.no_grad():
        maps = fixed(image)
        torch.manual_seed(0)
        first = fresh(image)[0]
        assert not torch.allclose(fresh(image)[0], first)
        alike = fresh.forward_taps(image.expand(2, -1, -1, -1), (90, 91), (5,))
        assert len({float(x[0, 0, 0]) for maps in alike.values() for x in maps}) == 4
        torch.manual_seed(0)
        assert torch.equal(fresh(image)[0], first)
        assert torch.equal(fixed(image)[0], maps[0])
        assert torch.equal(none(image)[0], none(image)[0])
        assert not torch.allclose(none(image)[0], maps[0])


def noise_of(backbone, batch, monkeypatch) -> torch.Tensor:
    """Return the noise that a batch's images get, up to the schedule's factors."""
    seen = []
    start = UNet.start

    def spy(self, x_t, *args):
        seen.append(x_t)
        return start(self, x_t, *args)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(UNet, "start", spy)
        backbone(batch)
    height, width = batch.shape[-2:]
    return seen[0][..., :height, :width] - backbone.schedule.add_noise(batch, 90, None)


def test_fixed_noise_depends_on_seed_and_coordinates(monkeypatch):
    backbone, image = build(seed=3), images(1, 40, 50)
    noise = noise_of(backbone, image, monkeypatch)
    sigma = (1 - float(backbone.schedule.alphas_cumprod[90])) ** 0.5
    assert torch.allclose(noise[0] / sigma, coordinate_noise(3, 40, 50, 3), atol=1e-5)
    canvas = torch.nn.functional.pad(image, (0, 60, 0, 90))
    assert torch.equal(noise_of(backbone, canvas, monkeypatch)[..., :40, :50], noise)


def test_image_noise_depends_on_seed_and_image(monkeypatch):
    backbone, batch = build(noise="image"), images(3, 40, 50)
    noise = noise_of(backbone, batch, monkeypatch)
    assert len({float(x) for x in noise[:, 0, 0, 0]}) == 3
    for i in range(3):
        assert torch.equal(noise_of(backbone, batch[i : i + 1], monkeypatch)[0], noise[i])
    canvas = torch.nn.functional.pad(batch, (0, 9, 0, 13))
    assert torch.equal(noise_of(backbone, canvas, monkeypatch)[..., :40, :50], noise)
    other = noise_of(build(noise="image", seed=1), batch, monkeypatch)
    assert not torch.allclose(other, noise, atol=0.1)


def test_several_timesteps_become_one_map():
    options = {"feedback": "windowed", "noise": "image", "out_strides": None, "blocks": (24, 25)}
    batch = images(2, 32, 32)
    joined = build(timestep=(90, 300), out_channels=None, **options)
    taps = joined.forward_taps(batch)
    assert list(taps) == [(t, b) for t in (90, 300) for b in (24, 25)]
    mean = build(timestep=(90, 300), out_channels=None, combine="mean", **options)
    for b, x, y, channels in zip((24, 25), joined(batch), mean(batch), joined.channels):
        assert x.shape[1] == channels == 2 * joined.unet.blocks[b].channels
        assert torch.equal(x, torch.cat([taps[90, b], taps[300, b]], 1))
        assert torch.allclose(y, (taps[90, b] + taps[300, b]) / 2)
    alone = build(timestep=300, out_channels=None, **options).forward_taps(batch)
    assert torch.equal(alone[300, 24], taps[300, 24])
    projected = build(timestep=(90, 300), **options)
    projected(batch)[0].sum().backward()
    assert all(part.any() for part in projected.proj[0].weight.grad.chunk(2, dim=1))


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_any_number_of_channels(channels):
    backbone = build(SMALL.replace(in_channels=channels))
    batch = torch.rand(2, channels, 40, 50) * 2 - 1
    assert backbone.in_channels == channels
    assert [x.shape[1] for x in backbone(batch)] == [48] * 4
    with pytest.raises(ValueError, match=f"{channels}, H, W"):
        backbone(images())


def test_projection_and_resizing_commute():
    """The cheaper order is taken; it must equal projecting first, then resizing."""
    backbone = build(blocks=(33, 24), out_strides=(8, 4))
    image = images()
    with torch.no_grad():
        taps = backbone.forward_taps(image)
        for i, (b, size) in enumerate(((33, (8, 12)), (24, (16, 24)))):
            expected = torch.nn.functional.interpolate(
                backbone.proj[i](taps[90, b]), size=size, mode="bilinear"
            )
            assert torch.allclose(backbone(image)[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feedback", [None, "all", {33: 4, 20: 16}])
@pytest.mark.parametrize("blocks", [(24,), (19, 33)])
def test_fine_tuning_leaves_no_parameter_without_a_gradient(feedback, blocks):
    backbone = build(feedback=feedback, blocks=blocks, out_strides=None).train()
    sum(x.square().mean() for x in backbone(images(2, 32, 32))).backward()
    unused = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    reached = {f"unet.{backbone.unet.blocks[b].name}." for b in range(1, max(blocks) + 1)}
    assert all(any(name.startswith(prefix) for name in trained) for prefix in reached)


def test_first_pass_grad_trains_what_only_the_first_pass_reaches():
    backbone = build(feedback={33: 4}, blocks=(24,), out_strides=None, first_pass_grad=True).train()
    sum(x.square().mean() for x in backbone(images(2))).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert backbone.unet.last_block == 33


@pytest.mark.parametrize("feedback", [None, "bottleneck"])
def test_frozen_stays_frozen(feedback):
    backbone = build(unet=SMALL.replace(dropout=0.5), feedback=feedback, freeze=True)
    before = {name: value.clone() for name, value in backbone.unet.state_dict().items()}
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        backbone.train()
        assert not backbone.unet.training
        assert backbone.proj.training
        optimizer.zero_grad()
        sum(x.square().mean() for x in backbone(images(2))).backward()
        optimizer.step()
    assert all(torch.equal(before[name], x) for name, x in backbone.unet.state_dict().items())
    assert all(p.grad is None for p in backbone.unet.parameters())
    moved = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in moved} == (
        {"proj", "feedback"} if feedback else {"proj"}
    )
    assert not any(p in optimizer.state for p in backbone.unet.parameters())


def test_frozen_single_pass_keeps_no_graph():
    backbone = build(freeze=True, out_channels=None, out_strides=None).train()
    assert not any(x.requires_grad for x in backbone(images()))


def test_class_conditional_models_work_with_and_without_a_label():
    config, image = golden.CONFIGS["classic64"], images(2)
    kwargs = dict(blocks=(18,), out_strides=None, out_channels=None)
    without = golden.fill(DiffusionBackbone(config, **kwargs))
    assert not hasattr(without.unet, "label_emb")
    fixed = golden.fill(DiffusionBackbone(config, class_label=3, **kwargs))
    with torch.no_grad():
        (third,) = fixed(image)
        assert not torch.allclose(without(image)[0], third)  # the label counts
        assert torch.equal(third, fixed(image, torch.tensor([3, 3]))[0])
        assert not torch.allclose(third, fixed(image, torch.tensor([4, 4]))[0])
    sum(x.square().mean() for x in fixed.train()(image)).backward()
    assert all(p.grad is not None for p in fixed.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="class_label=10: the U-Net has 10 classes"):
        DiffusionBackbone(config, class_label=10, **kwargs)
    with pytest.raises(ValueError, match="class_label=1: the U-Net has no classes"):
        DiffusionBackbone(SMALL, class_label=1)
    built = golden.fill(DiffusionBackbone(fixed.unet, **kwargs))
    with torch.no_grad():
        assert torch.equal(built(image, torch.tensor([3, 3]))[0], third)
    with pytest.raises(ValueError, match="labels y must be 2 integers from 0 to 9"):
        built(image)


def test_models_are_noised_by_their_own_schedule():
    config = golden.CONFIGS["classic64"].replace(noise_schedule="cosine")
    assert DiffusionBackbone(config, blocks=18, out_strides=(4,)).schedule.name == "cosine"


def test_activation_budget_reaches_the_u_net():
    with torch.device("meta"):
        several = DiffusionBackbone(SMALL, activation_budget=3.0, timestep=(90, 300))
        assert several.unet.activation_budget == 1.5
        built = DiffusionBackbone(UNet(SMALL), activation_budget=2)
        assert built.unet.activation_budget == 2
        assert DiffusionBackbone(built.unet).unet.activation_budget == 2


def test_a_built_u_net_is_taken_as_it_is():
    unet = golden.fill(UNet(SMALL))
    backbone = DiffusionBackbone(unet, out_channels=None)
    assert backbone.unet is unet
    trained = {n.split(".")[0] for n, p in unet.named_parameters() if p.requires_grad}
    assert "out" not in trained
    assert not any(p.requires_grad for p in unet.module(34).parameters())
    with pytest.raises(ValueError, match="block 33 is not built: this network ends at 24"):
        DiffusionBackbone(UNet(SMALL, 24))(images())


@pytest.mark.parametrize(
    ("dtype", "feedback", "out_channels"),
    [("bfloat16", None, None), (torch.float16, "windowed", 48)],
)
def test_a_frozen_u_net_in_half_precision(dtype, feedback, out_channels):
    settings = {"freeze": True, "feedback": feedback, "out_channels": out_channels}
    settings |= {"blocks": (24, 25), "out_strides": None}
    full, half = build(**settings).eval(), build(**settings, dtype=dtype).eval()
    chosen = getattr(torch, str(dtype).removeprefix("torch."))
    assert {p.dtype for p in half.unet.parameters()} == {chosen}
    others = [p for name, p in half.named_parameters() if not name.startswith("unet.")]
    assert all(p.dtype == torch.float32 for p in others)
    with torch.no_grad():
        for ours, expected in zip(half(images()), full(images())):
            assert ours.dtype == torch.float32
            assert (ours - expected).norm() / expected.norm() < 0.05
        assert half.forward_taps(images(), blocks=(24,))[90, 24].dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert half(images())[0].dtype != torch.float32
    if others:
        sum(x.square().mean() for x in half.train()(images())).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in others)


def test_half_precision_keeps_the_weights_of_a_file(tmp_path):
    path = tmp_path / "unet.pt"
    torch.save(golden.fill(UNet(SMALL)).state_dict(), path)
    settings = {"checkpoint": path, "freeze": True, "save_frozen": False, "out_channels": 8}
    full, half = (DiffusionBackbone(SMALL, dtype=t, **settings) for t in ("float32", "bfloat16"))
    weight = "input_blocks.3.0.in_layers.2.weight"
    expected = full.unet.state_dict()[weight].bfloat16()
    assert torch.equal(half.unet.state_dict()[weight], expected)
    half.load(path)
    assert torch.equal(half.unet.state_dict()[weight], expected)
    full.load_state_dict(half.state_dict())  # the same U-Net, in whatever type it is computed
    half.load_state_dict(full.state_dict())
    late = DiffusionBackbone(SMALL, dtype="bfloat16", **{**settings, "checkpoint": None})
    late._load_initial(path)  # as in MMEngine
    full.load_state_dict({**full.state_dict(), **late.state_dict()})


def add_to(backbone, index):
    backbone.unet.input_blocks[0][0].weight.data.view(-1)[index] += 1


CHANGES = {
    "state dict": lambda backbone, other: backbone.load_state_dict(other.state_dict()),
    "parent": lambda backbone, other: torch.nn.Sequential(backbone).load_state_dict(
        torch.nn.Sequential(other).state_dict()
    ),
    "U-Net": lambda backbone, other: backbone.unet.load_state_dict(other.unet.state_dict()),
    "a value": lambda backbone, other: add_to(backbone, 1),
    "half": lambda backbone, other: backbone.half(),
    "unfreeze": lambda backbone, other: add_to(backbone.requires_grad_(), 2),
}


ONE_BLOCK = {
    "unet": UNetConfig(32, (1, 1), 1, (2,), num_head_channels=16), "blocks": (6,),
    "out_channels": 8, "out_strides": (2,), "freeze": True, "save_frozen": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def unet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "unet.pt"
    torch.save(golden.fill(UNet(ONE_BLOCK["unet"])).state_dict(), path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_frozen_weights_are_saved(unet_file, change, dtype):
    settings = {**ONE_BLOCK, "checkpoint": unet_file, "dtype": dtype}
    backbone, fresh, untouched = (DiffusionBackbone(**settings) for _ in range(3))
    unchanged = copy.deepcopy(backbone).state_dict()
    assert not any("unet." in key for key in unchanged)
    CHANGES[change](backbone, build(**ONE_BLOCK))
    state = copy.deepcopy(backbone).state_dict()
    assert set(backbone.unet.state_dict(prefix="unet.")) < set(state)
    fresh.load_state_dict(state)
    for name, value in fresh.unet.state_dict().items():
        assert torch.equal(value, state[f"unet.{name}"].to(value.dtype)), name
    with pytest.raises(CheckpointError, match="frozen U-Net"):
        backbone.load_state_dict(unchanged)
    untouched.load_state_dict(unchanged)


def test_unchanged_frozen_weights_are_left_out(unet_file, tmp_path):
    backbone = DiffusionBackbone(checkpoint=unet_file, **ONE_BLOCK)
    state = backbone.state_dict()
    backbone.load(unet_file)
    other = tmp_path / "other.pt"
    torch.save(UNet(ONE_BLOCK["unet"]).state_dict(), other)
    kept = copy.deepcopy(backbone.unet.state_dict())
    backbone.load(other)
    assert any("unet." in key for key in backbone.state_dict())  # `checkpoint` is another one
    backbone.unet.load_state_dict(kept)  # as averaged weights are swapped in and out
    for same in (backbone, pickle.loads(pickle.dumps(backbone)), backbone.double()):
        assert same.state_dict().keys() == state.keys()
    backbone.save_frozen = True
    assert any("unet." in key for key in backbone.state_dict())


def test_fixed_noise_is_computed_once_for_the_largest_size(monkeypatch):
    made = []

    def spy(*args):
        made.append(args[:4])
        return coordinate_noise(*args)

    monkeypatch.setattr("diffbackbone.diffusion.coordinate_noise", spy)
    backbone = build(blocks=(5,), out_strides=(8,))
    with torch.no_grad():
        for height, width in ((64, 64), (32, 64), (64, 64), (128, 32), (96, 64), (128, 64)):
            backbone(images(1, height, width))
        assert made == [(3, 64, 64, 0), (3, 128, 64, 0)]
        backbone.seed = 1
        backbone(images())
    assert made[2:] == [(3, 64, 96, 1)]
    assert not any("field" in key for key in backbone.state_dict())


@pytest.mark.parametrize(
    ("settings", "autocast"),
    [
        ({"feedback": {5: 2}, "activation_budget": 0.001}, True),
        ({"freeze": True, "dtype": "bfloat16"}, False),
    ],
    ids=str,
)
def test_compiles_as_one_graph(settings, autocast):
    """Captured whole (fullgraph); code generation is left out to keep this quick."""
    config = UNetConfig(32, (1, 1), 1, (2,), num_head_channels=16)
    backbone = build(unet=config, blocks=(6,), out_strides=(2,), **settings).eval()
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    x = images(1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (expected,), (ours,) = backbone(x), compiled(x)
    assert ours.dtype == expected.dtype
    half = autocast or "dtype" in settings
    assert (ours - expected).norm() < (2e-2 if half else 1e-5) * expected.norm()
    if ours.requires_grad:
        ours.float().sum().backward()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"blocks": (38,)}, r"1 to 37 .* got \[38\]"),
        ({"blocks": ()}, "block numbers from 1 to 37"),
        ({"timestep": 1000}, "0 to 999"),
        ({"out_channels": 0}, "from 1 to 8192 or None, got 0"),
        ({"out_strides": (4, 8)}, r"one for each of 4 blocks, got \(4, 8\)"),
        ({"out_strides": (4, 8, 16, 30)}, "powers of two from"),
        ({"noise": "frozen"}, "random, fixed, image, none, got 'frozen'"),
        ({"feedback": "windowed", "blocks": (3,), "out_strides": (4,)}, "can't reach the taps"),
        ({"unet": {"preset": "tiny", "width": 3}}, "choose from preset, model_channels"),
        ({"dtype": "int8", "freeze": True}, "float32, bfloat16, float16, got 'int8'"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' needs freeze=True"),
        ({"activation_budget": -2}, "a number of GB from 0, or None for no limit, got -2"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DiffusionBackbone(kwargs.pop("unet", SMALL), **kwargs)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 64, 64), r"got torch.float32 \(3, 64, 64\)"),
        (torch.zeros(1, 1, 64, 64), r"\(1, 1, 64, 64\)"),
        (torch.zeros(0, 3, 64, 64), r"\(0, 3, 64, 64\)"),
        (torch.zeros(1, 3, 31, 64), r"at least 32 x 32 px, got .* \(1, 3, 31, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "got torch.uint8"),
        (torch.full((1, 3, 64, 64), 255.0), "reach from 255 to 255.*mean 127.5"),
        (torch.full((1, 3, 64, 64), -1.02), "reach from -1.02"),
        (torch.full((1, 3, 64, 64), torch.nan), "reach from nan to nan"),
        ([[1]], "got list"),
    ],
)
def test_bad_images(bad, message):
    with pytest.raises(ValueError, match=message):
        build(blocks=(1,), out_strides=None)(bad)


def test_images_are_checked_once_for_all_timesteps():
    ops = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Calls():
        build(blocks=(1,), out_strides=None).forward_taps(images(), (10, 20, 30))
    assert ops.count("aminmax") == 1
    assert "_local_scalar_dense" not in ops  # each would wait for the device


@pytest.mark.parametrize("timesteps", [(), (90, 20, 90), "90", (90, 1000), True])
def test_bad_timesteps_of_taps(timesteps):
    with pytest.raises(ValueError, match="timestep"):
        build(blocks=(1,), out_strides=None).forward_taps(images(), timesteps)


def test_numpy_integers_are_integers():
    config, (two, last) = golden.CONFIGS["classic64"], np.array([2, 18])
    blocks, strides = np.array([18, 18]), np.array([4, 8])
    backbone = DiffusionBackbone(
        config, None, np.int16(90), blocks, {last: two}, 8, strides, class_label=np.uint8(3)
    )
    assert backbone.feedback.mapping == {18: 2}
    settings = (*backbone.blocks, *backbone.strides, backbone.timestep, backbone.class_label)
    assert settings == (18, 18, 4, 8, 90, 3)
    assert {type(number) for number in settings} == {int}
    assert list(backbone.forward_taps(images(), np.arange(2), [last])) == [(0, 18), (1, 18)]
    assert list(backbone.forward_taps(images(), np.int64(5))) == [(5, 18)]
    for name in ("timestep", "blocks", "out_strides", "class_label"):
        with pytest.raises(ValueError, match=name):
            DiffusionBackbone(config, **{"blocks": 18, "out_strides": 4, name: np.True_})


@pytest.mark.parametrize(("low", "high", "warns"), [(0, 1, 1), (0, 0, 0), (0.2, 1, 0), (-1, 1, 0)])
def test_images_from_0_to_1_are_noticed_once(low, high, warns):
    _warn_unit_range.cache_clear()
    backbone = build(blocks=(1,), out_strides=None)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(2):
            backbone(torch.linspace(low, high, 3 * 32 * 32).view(1, 3, 32, 32))
    assert sum("2 * x - 1" in str(w.message) for w in caught) == warns


def test_import_needs_no_framework():
    code = (
        "import sys, diffbackbone\n"
        "bad = {'mmengine', 'mmseg', 'detectron2', 'timm', 'diffusers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
