"""The U-Net: parity with guided-diffusion's values, the block table, taps, kernels, memory."""

from __future__ import annotations

import dataclasses
import itertools
import json

import golden
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffbackbone import BlockInfo, UNet, UNetConfig
from diffbackbone.models.gd_config import PRESETS, resolve_config

TOLERANCE = 1e-5
SMALL = golden.CONFIGS["narrow256"]


@pytest.fixture(scope="module")
def reference():
    with np.load(golden.FILE) as data:
        yield dict(data)


@pytest.fixture(scope="module")
def small() -> UNet:
    return golden.fill(UNet(SMALL))


@pytest.mark.parametrize("arch", golden.CONFIGS)
def test_every_block_equals_the_authors_code(arch, reference):
    config = golden.CONFIGS[arch]
    unet = golden.fill(UNet(config))
    y = golden.Y if config.num_classes else None
    with torch.no_grad():
        features = unet.forward_features(golden.image(arch), golden.T, config.blocks, y)
        output = unet(golden.image(arch), golden.T, y)
    assert list(features) == list(config.blocks)
    for b, x in features.items():
        info = unet.blocks[b]
        assert x.shape == (2, info.channels, 64 // info.stride, 64 // info.stride)
    errors = {b: golden.relative_error(x, reference, f"{arch}/b{b}") for b, x in features.items()}
    assert max(errors.values()) < TOLERANCE, errors
    assert golden.relative_error(output, reference, f"{arch}/eps") < TOLERANCE


def test_blocks_of_the_256_px_model():
    blocks = UNetConfig.from_preset("gd256_uncond").blocks
    sizes = [256 // info.stride for info in blocks.values()]
    down = [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3 + [16] * 3
    up = [16] * 3 + [32] * 3 + [64] * 3 + [128] * 3 + [256] * 4
    assert sizes == down + [8] * 6 + up
    channels = [info.channels for info in blocks.values()]
    assert channels == [256] * 7 + [512] * 6 + [1024] * 12 + [512] * 6 + [256] * 6
    assert blocks[24] == BlockInfo(index=24, channels=1024, stride=16)
    assert (blocks[19].name, blocks[24].name) == ("middle_block", "output_blocks.4")


PARAMETERS = {  # what guided-diffusion's own code builds from the flags in its README
    "gd64": 295_904_454,
    "gd128": 421_529_606,
    "gd256": 553_838_086,
    "gd256_uncond": 552_814_086,
    "gd512": 558_997_638,
    "lsun_bedroom": 552_814_086,
    "lsun_cat": 552_814_086,
    "lsun_horse": 552_814_086,
    "tiny": 4_920_198,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = UNetConfig.from_preset(name)
    with torch.device("meta"):
        unet = UNet(config)
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert count == PARAMETERS[name]
    unseen = ("num_head_channels", "num_heads", "use_new_attention_order", "dropout", "image_size",
              "noise_schedule")  # fmt: skip
    rest = {field: getattr(config, field) for field in unseen}
    assert UNetConfig.from_state_dict(unet.state_dict(), **rest) == config


VARIANTS = [
    dict(zip(("use_scale_shift_norm", "resblock_updown", "conv_resample"), flags))
    for flags in itertools.product((True, False), repeat=3)
]


@pytest.mark.parametrize("levels", [(1,), (0.5, 1, 1.5)])
@pytest.mark.parametrize("flags", VARIANTS)
def test_architecture_is_read_off_the_shapes(flags, levels):
    strides = (2 ** (len(levels) - 1),)
    config = UNetConfig(
        64, levels, 1, strides, num_head_channels=32, num_classes=5, out_channels=3, **flags
    )
    with torch.device("meta"):
        state_dict = UNet(config).state_dict()
    found = UNetConfig.from_state_dict(state_dict, num_head_channels=32)
    if len(levels) == 1:  # nothing to resample by
        config = config.replace(resblock_updown=False, conv_resample=True)
    elif config.resblock_updown:
        config = config.replace(conv_resample=True)  # not used then
    assert found == config
    with torch.device("meta"):
        assert UNet(found).state_dict().keys() == state_dict.keys()


def test_taps_agree_with_one_another_and_stop_early(small):
    x = golden.image("narrow256")
    with torch.no_grad():
        alone = small.forward_features(x, golden.T, (24,))[24]
        both = small.forward_features(x, golden.T, (24, 5, 24))
        one, each = (small.forward_features(x, t, (24,))[24] for t in (90, torch.tensor([90, 90])))
    assert list(both) == [24, 5]
    assert torch.equal(both[24], alone)
    assert torch.allclose(one, each, atol=1e-5)  # one timestep serves the whole batch

    ran = []
    hooks = [
        small.module(b).register_forward_hook(lambda *_, b=b: ran.append(b)) for b in small.blocks
    ]
    with torch.no_grad():
        small.forward_features(x, golden.T, (20, 5))
    for hook in hooks:
        hook.remove()
    assert ran == list(range(1, 21))


def test_only_what_is_reached_is_built(small):
    partial = UNet(SMALL, last_block=24)
    assert len(partial.output_blocks) == 5
    partial.load_state_dict({k: small.state_dict()[k] for k in partial.state_dict()})
    x = golden.image("narrow256")
    with torch.no_grad():
        ours = partial.eval().forward_features(x, 90, (24,))[24]
        assert torch.equal(ours, small.forward_features(x, 90, (24,))[24])
    with pytest.raises(ValueError, match="ends at 24"):
        partial.forward_features(x, 90, (25,))
    with pytest.raises(ValueError, match="ends at 24"):
        partial(x, 90)


def test_skips_that_nobody_reads_are_let_go(small):
    x = golden.image("narrow256")
    with torch.no_grad():
        state = small.start(x, 90, last=24)
        small.traverse(state, 18)
        assert sorted(state.skips) == [14, 15, 16, 17, 18]
        small.traverse(state, 24)
        assert not state.skips


def test_injected_maps_are_carried_by_trunk_and_skip(small):
    x = golden.image("narrow256")
    bump = torch.ones(2, SMALL.blocks[14].channels, 2, 2)  # resized to 4 x 4
    with torch.no_grad():
        plain = small.forward_features(x, 90, (14, 19, 24))
        fed = small.forward_features(x, 90, (14, 19, 24), inject={14: bump})
    assert torch.allclose(fed[14], plain[14] + 1, atol=1e-6)
    assert not torch.allclose(fed[19], plain[19], atol=1e-3)
    state = small.start(x, 90, last=24)
    small.traverse(state, 14, inject={14: [bump]})
    assert torch.equal(state.skips[14], state.h)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_takes_a_memory_linear_kernel(new_order, layout):
    config = SMALL.replace(use_new_attention_order=new_order, num_head_channels=32)
    unet = UNet(config, last_block=22).to(memory_format=layout)
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=layout)
    # raises where only the quadratic "math" kernel would do
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        unet.forward_features(x, 90, (22,))[22].sum().backward()
        q = torch.randn(1, 2, 32, 16).transpose(2, 3)
        with pytest.raises(RuntimeError):  # it could fail
            torch.nn.functional.scaled_dot_product_attention(q, q, q)


def test_recomputing_changes_no_gradient():
    gradients = []
    for options in ({}, {"activation_checkpointing": True}, {"activation_budget": 0.002}):
        unet = golden.fill(UNet(SMALL, 24, **options)).train()
        maps = unet.forward_features(golden.image("narrow256"), golden.T, (24,))
        maps[24].square().mean().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
    for other in gradients[1:]:
        for name, grad in gradients[0].items():
            assert torch.allclose(grad, other[name], rtol=1e-4, atol=1e-7), name


def kept_bytes(unet, size=128, blocks=(24,)):
    """Bytes that autograd saves in a forward pass, parameters left out."""
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = unet.forward_features(torch.randn(1, 3, size, size), 90, blocks)
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    maps.clear()
    return sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in weights)


@pytest.mark.parametrize("last", [19, 37])
@pytest.mark.parametrize("updown", [True, False])
def test_what_a_block_keeps_is_known_beforehand(last, updown, monkeypatch):
    monkeypatch.setattr("diffbackbone.models.ops._picks_kernels", lambda x: False)  # as on a GPU
    config = SMALL.replace(resblock_updown=updown)
    expected = 4 * 128**2 * sum(config.blocks[b].kept_values for b in range(1, last + 1))
    assert kept_bytes(UNet(config, last), blocks=(last,)) == pytest.approx(expected, rel=0.05)


def test_activation_budget_is_kept_by_recomputing_as_little_as_it_takes(monkeypatch):
    monkeypatch.setattr("diffbackbone.models.ops._picks_kernels", lambda x: False)  # as on a GPU
    free = kept_bytes(UNet(SMALL, 24))
    counts = []
    for share in (1.1, 0.8, 0.5, 0.3):
        budget = share * free / 1e9
        unet = UNet(SMALL, 24, activation_budget=budget)
        assert kept_bytes(unet) < 1.05 * budget * 1e9
        recomputed = unet.start(torch.randn(1, 3, 128, 128), 90, 24).recompute
        counts.append(len(recomputed))
        # the largest maps first
        assert recomputed == set(
            sorted(range(1, 25), key=lambda b: unet.blocks[b].stride)[: len(recomputed)]
        )
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3]
    # twice the images need more of it; without gradients there is nothing to keep
    unet = UNet(SMALL, 24, activation_budget=0.8 * free / 1e9)
    assert len(unet.start(torch.randn(2, 3, 128, 128), 90, 24).recompute) > counts[1]
    with torch.no_grad():
        assert unet.start(torch.randn(1, 3, 128, 128), 90, 24).recompute == frozenset()
    with torch.autocast("cpu", torch.bfloat16):  # half the bytes, so twice the images
        assert len(unet.start(torch.randn(2, 3, 128, 128), 90, 24).recompute) == counts[1]


def test_half_precision(small):
    x = golden.image("narrow256")
    half = golden.fill(UNet(SMALL)).bfloat16()
    with torch.no_grad():
        expected = small.forward_features(x, 90, (24,))[24]
        found = [half.forward_features(x, 90, (24,))[24]]
        assert half(x, 90).dtype == x.dtype
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                found.append(small.forward_features(x, 90, (24,))[24])
    assert [y.dtype for y in found] == [torch.bfloat16, torch.bfloat16, torch.float16]
    assert all((y.float() - expected).norm() / expected.norm() < 0.05 for y in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_channels": 40}, "multiple of 32 .* with model_channels 40"),
        ({"model_channels": 0}, "model_channels must be an integer from 1 .* got 0"),
        ({"num_res_blocks": 10**12}, "num_res_blocks"),
        ({"channel_mult": (1, -1)}, "channel_mult must be a positive number"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"resblock_updown": 1}, "True or False"),
        ({"attention_strides": (64,)}, r"of \[1, 2, 4, 8, 16, 32\]"),
        ({"num_head_channels": 48}, "num_head_channels must be a divisor"),
        ({"num_head_channels": None, "num_heads": 3}, "num_heads must be a divisor"),
        ({"num_head_channels": None, "num_heads_upsample": 3}, "num_heads_upsample must be a div"),
        ({"dropout": 2}, "dropout"),
        ({"noise_schedule": "sqrt"}, "'linear' or 'cosine', got 'sqrt'"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(UNetConfig(), **changes)


def test_configurations_are_resolved(small):
    tiny = UNetConfig.from_preset("tiny")
    changed = tiny.replace(dropout=0.1, num_head_channels=None)
    fields = {"preset": "tiny", "dropout": 0.1, "num_head_channels": -1}
    for unet, expected in (
        ("tiny", tiny), (tiny, tiny), (small, SMALL), (fields, changed),
        (json.dumps(fields), changed), ({"channel_mult": [1, 1, 2, 2, 4, 4]}, UNetConfig()),
    ):  # fmt: skip
        assert resolve_config(unet) == expected
    for wrong in ("gd1024", '{"preset": "tiny"', '{"wings": 2}', {"wings": 2}, 3, None):
        with pytest.raises(ValueError, match="unknown preset|wings|delimiter"):
            resolve_config(wrong)


def test_bad_requests(small):
    x, conditional = golden.image("narrow256"), UNet(golden.CONFIGS["classic64"])
    for size, block, message in (
        (64, 38, r"from 1 to 37 .* got \[38\]"),
        (64, 0, "from 1 to 37"),
        (60, 24, r"multiples of 32, got \(60, 64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            small.forward_features(x[..., :size, :], 90, (block,))
    with pytest.raises(ValueError, match="not class-conditional"):
        small(x, 90, golden.Y)
    for labels in (None, [3, 10], [-1, 3], [3], [[3, 3]], [3.0, 4.0]):
        with pytest.raises(ValueError, match="2 integers from 0 to 9"):
            conditional(x, 90, None if labels is None else torch.tensor(labels))
