"""Networks of diffusers: the same features as its own modules compute, and all of the backbone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from diffbackbone import DiffusionBackbone  # noqa: E402
from diffbackbone.padding import pad_to_multiple  # noqa: E402

T = 90


def fill(*modules: nn.Module) -> None:
    """Give all weights random values, so that no branch or norm is the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.data = noise * scale + ("norm" in name and name.endswith("weight"))


def ends_of_blocks(net: nn.Module) -> list[nn.Module]:
    """Return the module whose output is block b's, for b = 1, 2, ..., by hand."""
    if hasattr(net, "transformer_blocks"):
        return list(net.transformer_blocks)
    ends = [net.conv_in]
    for level in net.down_blocks:
        ends += getattr(level, "attentions", None) or level.resnets
        ends += level.downsamplers or []
    if net.mid_block is not None:
        ends.append(net.mid_block)
    for level in net.up_blocks:
        last = list(getattr(level, "attentions", None) or level.resnets)
        ends += [*last[:-1], level.upsamplers[0]] if level.upsamplers else last
    return ends


@torch.no_grad()
def watch(net: nn.Module, *args, **kwargs) -> dict[int, torch.Tensor]:
    """Run diffusers' own forward pass, and return what its modules put out at each block."""
    found: dict[int, torch.Tensor] = {}

    def hook(b):
        def keep(module, inputs, output):
            found[b] = output[0] if isinstance(output, tuple) else output

        return keep

    handles = [m.register_forward_hook(hook(b)) for b, m in enumerate(ends_of_blocks(net), 1)]
    net.eval()(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def assert_close(ours: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> None:
    assert list(ours) == list(expected)
    for b, x in ours.items():
        assert x.shape == expected[b].shape, b
        error = (x - expected[b]).abs().max() / expected[b].abs().max()
        assert error < 1e-5, f"block {b}: {error}"


SMALL = {"sample_size": 32, "norm_num_groups": 8, "attention_head_dim": 8}
UNETS = {
    "ddpm": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "center_input_sample": True,
    },
    "adm": {
        "block_out_channels": (16, 16, 32, 32, 48, 48),
        "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "num_class_embeds": 10,
    },
    "no_middle": {
        "block_out_channels": (16, 32),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "mid_block_type": None,
        "layers_per_block": 1,
        "class_embed_type": "timestep",
    },
    "no_attention": {
        "block_out_channels": (16, 32, 32, 32),
        "down_block_types": ("DownBlock2D",) * 4,
        "up_block_types": ("UpBlock2D",) * 4,
        "add_attention": False,
        "layers_per_block": 3,
        "class_embed_type": "identity",
        "downsample_padding": 0,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that diffusers has written, by name."""
    root = tmp_path_factory.mktemp("diffusers")
    for name, config in UNETS.items():
        net = diffusers.UNet2DModel(**SMALL, **config)
        fill(net)
        diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(root / name)
    return root


def build(folder, **kwargs) -> DiffusionBackbone:
    """Build a frozen backbone on the last block."""
    options = {"out_channels": None, "out_strides": None, "freeze": True, "noise": "none", **kwargs}
    unet = options.pop("unet", f"diffusers://{folder}")
    return DiffusionBackbone(unet, timestep=T, **options)


@pytest.mark.parametrize("name", UNETS)
def test_taps_of_unet2d_equal_diffusers_own(folders, name):
    net = diffusers.UNet2DModel.from_pretrained(folders / name / "unet")
    blocks = range(1, len(ends_of_blocks(net)) + 1)
    backbone = build(folders / name, blocks=blocks)
    deepest = backbone.size_divisibility
    x = torch.randn(2, 3, 2 * deepest, 3 * deepest)
    t = torch.tensor([3, 700])
    labels = {
        "adm": torch.tensor([3, 9]),
        "no_middle": torch.tensor([5.0, 6.0]),
        "no_attention": torch.randn(2, 64),
    }.get(name)
    expected = watch(net, x, t, labels)
    assert_close(backbone.unet.forward_features(x, t, blocks, labels), expected)


def test_adm_has_37_blocks(folders):
    infos = build(folders / "adm", blocks=24).unet.blocks
    assert len(infos) == 37
    assert [infos[b].stride for b in (1, 4, 19, 21, 22, 24, 37)] == [1, 2, 32, 32, 16, 16, 1]
    assert [infos[b].part for b in (18, 19, 20)] == ["encoder", "middle", "decoder"]


def test_any_size_is_padded(folders):
    net = diffusers.UNet2DModel.from_pretrained(folders / "ddpm" / "unet")
    backbone = build(folders / "ddpm", blocks=(2, 9, 13))
    images = torch.rand(1, 3, 37, 53) * 2 - 1
    x_t = backbone.schedule.add_noise(pad_to_multiple(images, 4), T, None)
    expected = watch(net, x_t, T)
    for b, x in zip(backbone.blocks, backbone(images)):
        own = expected[b][..., : x.shape[-2], : x.shape[-1]]
        assert x.shape[-2:] == tuple(-(-s // backbone.unet.blocks[b].stride) for s in (37, 53))
        assert_close({b: x}, {b: own})
