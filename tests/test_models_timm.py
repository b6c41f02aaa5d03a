"""timm's networks: taps equal timm's own, sizes, noise, pruning, weights from files."""

from __future__ import annotations

import math
from typing import Any

import golden
import pytest
import torch

from diffbackbone import CheckpointError, DiffusionBackbone, load_checkpoint
from diffbackbone.costs import block_costs
from diffbackbone.diffusion import coordinate_noise
from diffbackbone.models import build_network, resolve_network
from diffbackbone.models.timm import TimmModel, resolve
from diffbackbone.utils import MissingPackageError, UserError

timm = pytest.importorskip("timm")

SMALL = {"depth": 3, "embed_dim": 32, "num_heads": 2}
ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("test_resnet", {}),
    "resnet50": ("resnet50", {"channels": (16, 16, 16, 16), "layers": (1, 1, 1, 1)}),
    "vit": ("vit_base_patch16_224.mae", {**SMALL, "img_size": 64}),
    "vit_no_class_token": ("vit_base_patch16_224", {**SMALL, "img_size": 64, "class_token": False}),
    "registers": ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 70}),
    "dinov3": ("vit_small_patch16_dinov3", {**SMALL, "img_size": 64}),
    "beit": ("beit_base_patch16_224", {**SMALL, "img_size": 64}),  # of fixed size
    "convnext": ("test_convnext", {}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2)},
    ),
    "efficientnet": ("test_efficientnet", {}),
}
ARCHS["vit_no_class_token"][1]["global_pool"] = "avg"
TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:.*weights are RANDOM")


def unet(arch: str, **fields) -> dict[str, Any]:
    """The network as a config file gives it, with random weights."""
    name, options = ARCHS[arch]
    return {"preset": f"timm:{name}", "pretrained": False, **options, **fields}


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Fill the weights, since fresh ones hide residual branches; buffers stay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(golden.value(name, tuple(parameter.shape)))
    return model.eval()


def reference(arch: str, **options) -> torch.nn.Module:
    name, own = ARCHS[arch]
    return fill(timm.create_model(name, **own, **options))


def build(arch: str, **kwargs) -> DiffusionBackbone:
    fields = kwargs.pop("fields", {})
    kwargs = {"out_channels": None, "out_strides": None, **kwargs}
    backbone = DiffusionBackbone(unet(arch, **fields), **kwargs)
    fill(backbone.unet.model)
    return backbone.eval()


def images(*size: int, n: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, *size, generator=generator) * 2 - 1


def normalize(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    return ((x + 1) / 2 - mean) / std


@pytest.mark.parametrize("arch", ARCHS)
def test_taps_equal_timm(arch):
    config = resolve_network(unet(arch))
    last = len(config.blocks)
    backbone = build(arch, blocks=(last, 1))
    size = config.image_size
    model = reference(arch)
    with torch.no_grad():
        expected = model.forward_intermediates(
            normalize(model, images(size, size)), intermediates_only=True
        )
        taps = backbone.forward_taps(images(size, size), blocks=range(1, last + 1))
    assert len(expected) == last
    assert list(taps) == [(0, b) for b in range(1, last + 1)]
    for b, x in enumerate(expected, 1):
        assert taps[0, b].shape == x.shape
        assert (taps[0, b] - x).abs().max() <= TOLERANCE * x.abs().max()
        assert config.blocks[b].channels == x.shape[1]
        assert config.blocks[b].stride == size / x.shape[2]


@pytest.mark.parametrize("name", ["resnet10t", "levit_128s", "tresnet_m"])
def test_strides_where_the_networks_own_size_is_no_multiple(name):
    config = resolve(name, pretrained=False)
    last = len(config.blocks)
    strides = [config.blocks[b].stride for b in range(1, last + 1)]
    expected = {"levit_128s": [16, 32, 64], "tresnet_m": [4, 4, 8, 16, 32]}
    assert strides == expected.get(name, [2, 4, 8, 16, 32])
    options = {"blocks": (last,), "noise": "none", "out_channels": None, "out_strides": None}
    backbone = DiffusionBackbone(config, **options).eval()
    own, given = images(config.image_size, config.image_size, n=1), images(64, 128, n=1)
    sizes = []
    forward = backbone.unet.forward_features
    backbone.unet.forward_features = lambda x, *a: (
        sizes.append(tuple(x.shape[2:])) or forward(x, *a)
    )
    with torch.no_grad():
        (x,), (y,) = backbone(own), backbone(given)
        model = backbone.unet.model
        expected = model.forward_intermediates(normalize(model, own), intermediates_only=True)[-1]
    assert (x - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert y.shape[2:] == (64 // strides[-1], 128 // strides[-1])
    assert sizes == [own.shape[2:], (64, 128)]


@pytest.mark.parametrize("arch", ["resnet50", "registers", "beit", "swin"])
def test_any_size_gives_the_promised_maps(arch):
    blocks = resolve_network(unet(arch)).blocks
    chosen = (len(blocks), 2)
    backbone = build(arch, blocks=chosen)
    for size in ((32, 45), (70, 101)):
        with torch.no_grad():
            maps = backbone(images(*size))
        for x, b in zip(maps, chosen):
            expected = [math.ceil(side / blocks[b].stride) for side in size]
            assert x.shape == (2, blocks[b].channels, *expected)


@pytest.mark.parametrize("last", [1, None])
@pytest.mark.parametrize("arch", ["resnet50", "registers", "swin"])
def test_only_blocks_up_to_the_last_tap_are_built_and_trained(arch, last):
    count = len(resolve_network(unet(arch)).blocks)
    last = last or count
    backbone = build(arch, blocks=(last,)).train()
    (maps,) = backbone(images(64, 64))
    maps.square().mean().backward()
    lost = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost
    whole = {f"unet.model.{name}" for name, _ in reference(arch).named_parameters()}
    assert {name for name, _ in backbone.named_parameters()} < whole
    if last < count:
        with pytest.raises(ValueError, match="is not built"):
            backbone.forward_taps(images(64, 64), blocks=(2,))


def test_a_run_ends_with_the_last_tap():
    backbone = build("vit", blocks=(3,))
    backbone.unet.module(3).register_forward_hook(lambda *_: pytest.fail("block 3 ran"))
    with torch.no_grad():
        assert list(backbone.forward_taps(images(64, 64), blocks=(2, 1))) == [(0, 2), (0, 1)]


def test_networks_of_fixed_size_see_the_whole_image():
    backbone = build("beit", blocks=(2,))
    assert backbone.unet.config.facts.fixed
    for arch in ("registers", "swin"):  # which are told to take any size
        assert not resolve_network(unet(arch)).facts.fixed
    large = images(128, 192)
    with torch.no_grad():
        before = backbone(large)[0]
        large[..., -16:, -16:] = 0
        after = backbone(large)[0]
    assert before.shape[-2:] == (8, 12)
    assert (before - after)[..., -1, -1].abs().max() > 1e-3


@pytest.mark.parametrize("norm", [True, False])
def test_last_norm_on_request(norm):
    backbone = build("vit", blocks=(3,), fields={"norm": norm})
    model = reference("vit")
    with torch.no_grad():
        expected = model.forward_intermediates(
            normalize(model, images(64, 64)), indices=[1], norm=norm, intermediates_only=True
        )
        taps = backbone.forward_taps(images(64, 64), blocks=(2,))
    assert (taps[0, 2] - expected[0]).abs().max() <= TOLERANCE * expected[0].abs().max()


def test_noise_is_added_on_request_alone():
    clean = build("resnet", blocks=(3,))
    assert (clean.timestep, clean.noise) == (0, "none")
    noised = build("resnet", blocks=(3,), timestep=300, noise="fixed")
    x = images(64, 64)
    x_t = noised.schedule.add_noise(x, 300, coordinate_noise(3, 64, 64))
    with torch.no_grad():
        assert torch.equal(noised(x)[0], noised.unet.forward_features(x_t, 300, (3,))[3])
        assert torch.equal(clean(x)[0], clean.unet.forward_features(x, 0, (3,))[3])
    with pytest.raises(ValueError, match="only timestep 0"):
        clean.forward_taps(x, (0, 90))


def test_what_timm_networks_lack_is_refused():
    with pytest.raises(ValueError, match="single pass"):
        build("vit", blocks=(3,), feedback={3: 1})
    with pytest.raises(ValueError, match="activation_checkpointing"):
        build("vit", blocks=(3,), activation_budget=1)
    with pytest.raises(ValueError, match="from 1 to 3"):
        build("vit", blocks=(4,))
    with pytest.raises(ValueError, match="no network 'resnet999'"):
        resolve("resnet999")
    with pytest.raises(TypeError, match="colour"):
        build("vit", blocks=(3,), fields={"colour": 1})


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for active in (False, True):
        backbone = build("vit", blocks=(3,), activation_checkpointing=active)
        backbone(images(64, 64))[0].square().mean().backward()
        grads.append([p.grad for p in backbone.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads))


def test_costs():
    costs = block_costs(resolve_network(unet("resnet")), 64, 64)
    assert [cost.height for cost in costs] == [32, 16, 8, 4, 2]
    assert costs[4].flops > costs[0].flops > 0
    last = build_network(resolve_network(unet("resnet")), 4)
    assert costs[3].total_parameters == sum(p.numel() for p in last.parameters())


# --------------------------------------------------------------------------------------------------
# Weights


def equal(model: TimmModel, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in model.model.state_dict().items())


@pytest.mark.parametrize("arch", ["resnet", "registers"])
def test_files_of_timm(arch, tmp_path):
    model = reference(arch, num_classes=7)  # fine-tuned on a set of its own
    path = tmp_path / "weights.pth"
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, path)
    backbone = DiffusionBackbone(
        {**unet(arch), "pretrained": True}, path, blocks=(2,), out_strides=None
    )
    assert equal(backbone.unet, model)
    report = backbone.load(path)
    assert report.prefix == "module."
    assert set(report.loaded) == set(backbone.unet.state_dict())
    assert len(report.loaded) + len(report.unused) == len(state)


def test_files_of_the_networks_authors(tmp_path):
    model = reference("registers")
    state = {**model.state_dict(), "mask_token": torch.zeros(1, 32)}  # as DINOv2 has it
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([state["cls_token"], state["pos_embed"]], dim=1)
    state["cls_token"] = torch.zeros_like(state["cls_token"])
    torch.save(state, tmp_path / "dinov2.pth")
    whole = build_network(resolve_network(unet("registers")))
    load_checkpoint(whole, tmp_path / "dinov2.pth")
    with torch.no_grad():
        taps = whole.eval().forward_features(images(70, 70), 0, (3,))
        (expected,) = model.forward_intermediates(
            normalize(model, images(70, 70)), indices=[2], intermediates_only=True
        )
    assert (taps[3] - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_files_of_other_networks_are_refused(tmp_path):
    torch.save(reference("vit").state_dict(), tmp_path / "weights.pth")
    model = build_network(resolve_network(unet("resnet")), 3)
    with pytest.raises(CheckpointError, match="no weights of this network"):
        load_checkpoint(model, tmp_path / "weights.pth")
    state = reference("resnet").state_dict()
    del state["layer1.0.bn1.weight"]
    state["layer4.0.bn1.weight"] = torch.zeros(7)  # not built, and yet part of the network
    torch.save({**state, "layer9.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="missing: .*\n.*shape of .*\n.*unexpected: "):
        load_checkpoint(model, tmp_path / "weights.pth")


def test_weights_come_from_the_hub_unless_a_file_is_given(monkeypatch, recwarn):
    create, asked = timm.create_model, []

    def create_model(name, pretrained=False, **kwargs):
        model = fill(create(name, **kwargs))
        asked.append(pretrained)
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    arguments = {"blocks": (3,), "freeze": True, "save_frozen": False, "out_strides": None}
    backbone = DiffusionBackbone("timm:test_resnet", **arguments)
    assert asked == [False, True]  # first on the meta device
    assert not recwarn
    state = backbone.state_dict()
    assert not any(key.startswith("unet.") for key in state)
    DiffusionBackbone("timm:test_resnet", **arguments).load_state_dict(state)

    def offline(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no connection")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"no connection.*pretrained=False"):
        DiffusionBackbone("timm:test_resnet", **arguments)


def test_the_package_is_an_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"diffbackbone\[timm\]"):
        resolve_network("timm:resnet50")
