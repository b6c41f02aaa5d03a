"""Layers against the plain ones that they stand for; which way is taken; what stays in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffbackbone.costs import LiveTensors, counting_flops
from diffbackbone.models import ops
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import AttentionBlock, ResBlock, UNet
from diffbackbone.models.ops import Conv3x3, GroupNorm32, recomputed

NHWC = torch.channels_last


def seeded(*shape, seed=0, offset=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


def filled(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.5)
    return module


class Calls(TorchDispatchMode):
    """The operators that ran, with the shape of their first output."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def error(ours, exact):
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def exact_norm(norm, x, scale=None, shift=None, silu=False):
    y = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    if scale is not None:
        y = y * (1 + scale.double())[..., None, None] + shift.double()[..., None, None]
    return F.silu(y) if silu else y


# ---- norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (96, 50)])
def test_norm_is_norm_scale_shift_silu(grad, memory_format, rows, silu, size, monkeypatch):
    monkeypatch.setattr(ops, "CACHED", 64 * 1000)  # 96 x 50 positions are five pieces, one smaller
    norm = filled(GroupNorm32(64))
    x = seeded(2, 64, *size, offset=3.0).to(memory_format=memory_format)
    embedded = [seeded(rows, 64, seed=i) for i in (1, 2)] if rows else []
    before = x.clone()
    with torch.set_grad_enabled(grad):
        y = norm(x, *embedded, silu=silu)
    assert error(y, exact_norm(norm, x, *embedded, silu=silu)) < 1e-6
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(x, before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
def test_norm_of_a_large_map_is_accurate(memory_format):
    """Torch's own kernel is not, channels-last: it adds up a million values one by one."""
    norm = filled(GroupNorm32(32))
    x = seeded(1, 32, 1024, 1024, offset=1.5).to(memory_format=memory_format)
    exact = exact_norm(norm, x)
    with torch.no_grad():
        assert error(norm(x), exact) < 2e-6
        if memory_format is NHWC:
            plain = F.group_norm(x, 32, norm.weight, norm.bias, norm.eps)
            assert error(plain, exact) > 1e-5  # else this path has lost its reason


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_norm_may_write_over_what_it_is_given(rows):
    norm = filled(GroupNorm32(64))
    embedded = [seeded(rows, 64, seed=i) for i in (1, 2)] if rows else []
    x = seeded(2, 64, 40, 40).to(memory_format=NHWC)
    with torch.no_grad():
        expected = norm(x.clone(memory_format=torch.preserve_format), *embedded, silu=True)
        y = norm(x, *embedded, silu=True, reuse=True)
    assert torch.equal(y, expected)
    assert (y.data_ptr() == x.data_ptr()) == (rows < 2)
    x = seeded(2, 64, 40, 40).requires_grad_()
    norm(x, *embedded, silu=True, reuse=True).sum().backward()  # never under autograd
    assert torch.equal(x, seeded(2, 64, 40, 40))


def test_one_row_of_scale_costs_no_pass_over_the_map():
    norm = filled(GroupNorm32(64))
    for rows, passes in ((1, 0), (2, 2)):
        with torch.no_grad(), Calls() as calls:
            norm(seeded(2, 64, 8, 8), seeded(rows, 64), seeded(rows, 64), silu=True)
        assert sum(name in ("mul_", "add_") for name in calls.names) == passes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
def test_norm_in_half_precision(dtype, grad, device, memory_format):
    norm = filled(GroupNorm32(64))
    x = seeded(2, 64, 24, 20, offset=200.0).to(dtype)  # squares add up to more than float16 holds
    x = x.to(memory_format=memory_format)
    with torch.set_grad_enabled(grad):
        if device == "meta":
            y = norm.to("meta")(x.to("meta"), silu=True)
            assert (y.shape, y.dtype) == (x.shape, dtype)
            return
        y = norm(x, silu=True)
        assert y.dtype == dtype
        assert error(y, exact_norm(norm, x, silu=True)) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("chunk", [1, 2 * 30 * 24 * 20, 5000, 2**25])
def test_norm_in_float32_takes_few_groups_at_a_time(chunk, monkeypatch):
    """As on a GPU, whose kernel needs float32 input; float16 on a CPU goes the same way."""
    monkeypatch.setattr(ops, "NORM_CHUNK", chunk)
    norm = filled(GroupNorm32(64))
    x = seeded(2, 64, 24, 20, offset=3).half()
    with torch.no_grad():
        assert error(norm(x), exact_norm(norm, x)) < 2 * torch.finfo(torch.float16).eps


def test_half_precision_needs_little_more_memory_than_half():
    """On the meta device, which takes a GPU's way."""
    norm = GroupNorm32(256).to("meta")

    def peak(dtype):
        x = torch.empty(1, 256, 1024, 1024, dtype=dtype, device="meta")
        with torch.no_grad(), LiveTensors() as live:
            norm(x, silu=True, reuse=True)
        return live.peak

    assert peak(torch.bfloat16) < 0.8 * peak(torch.float32)


def test_norm_passes_gradients_like_the_plain_layers():
    norm = filled(GroupNorm32(64))
    inputs = [seeded(2, 64, 9, 8), seeded(1, 64, seed=1), seeded(1, 64, seed=2)]

    def plain(x, scale, shift):
        y = F.group_norm(x, 32, norm.weight, norm.bias, norm.eps)
        return F.silu(y * (1 + scale)[..., None, None] + shift[..., None, None])

    gradients = []
    for function in (plain, lambda *args: recomputed(lambda *a: norm(*a, silu=True), *args)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(seeded(*out.shape, seed=3))
        gradients.append([x.grad for x in (*leaves, norm.weight, norm.bias)])
        norm.zero_grad()
    for ours, expected in zip(*gradients):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


# ---- convolution ----------------------------------------------------------------------------


def plain(conv, x, upsample):
    x = x.double()
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv2d(x, conv.weight.double(), conv.bias.double(), padding=1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (16, 16), (3, 70), (17, 16), (32, 32), (31, 37)])
@pytest.mark.parametrize("batch", [1, 3])
def test_convolution_is_the_plain_one(grad, upsample, memory_format, shape, batch):
    conv = filled(Conv3x3(24, 40))
    x = seeded(batch, 24, *shape).to(memory_format=memory_format)
    with torch.set_grad_enabled(grad):
        y = conv(x, upsample=upsample)
    assert y.shape == (batch, 40, *(2 * s if upsample else s for s in shape))
    assert error(y, plain(conv, x, upsample)) < 2e-6


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("size", [8, 40])
def test_convolution_in_bfloat16(upsample, size):
    conv, x = filled(Conv3x3(24, 40)).bfloat16(), seeded(1, 24, size, size).bfloat16()
    with torch.no_grad(), Calls() as calls:
        y = conv(x, upsample=upsample)
    assert y.dtype == torch.bfloat16
    assert error(y, plain(conv, x, upsample)) < 2 * torch.finfo(torch.bfloat16).eps
    assert ("baddbmm" in calls.names) == (size == 8)
    assert ("upsample_nearest2d" in calls.names) == upsample  # sums of rounded weights lose digits


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 40, 40), (2, 32, 16)])
@pytest.mark.parametrize("upsample", [False, True])
def test_convolution_passes_gradients_like_the_plain_one(shape, upsample):
    conv = filled(Conv3x3(8, 12))
    x = seeded(shape[0], 8, *shape[1:]).requires_grad_()
    y = conv(x, upsample=upsample)
    direction = seeded(*y.shape, seed=1)
    ours = torch.autograd.grad(y, (x, conv.weight, conv.bias), direction)
    exact = torch.autograd.grad(
        plain(conv, x, upsample), (x, conv.weight, conv.bias), direction.double()
    )
    for a, b in zip(ours, exact):
        assert error(a, b.double()) < 5e-6


@pytest.mark.parametrize(
    ("size", "upsample", "kernel"),
    [
        (8, False, "baddbmm"),
        (16, False, "baddbmm"),
        (17, False, "convolution"),
        (8, True, "baddbmm"),
        (16, True, "convolution"),
        (32, True, "convolution"),
    ],
)
def test_small_maps_are_one_matrix_product(size, upsample, kernel):
    conv, x = Conv3x3(8, 8), seeded(1, 8, size, size)
    with torch.no_grad(), Calls() as calls:
        conv(x, upsample=upsample)
    found = {"baddbmm", "convolution"} & set(calls.names)
    assert found == {kernel}
    assert ("upsample_nearest2d" in calls.names) == (upsample and size < 32)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("size", [8, 16, 17, 31, 32])
def test_the_batch_has_no_say_in_the_kernel(size, upsample):
    """Else an image's maps, and which side of a ReLU they fall on, would depend on its company."""
    ways = []
    for batch in (1, 2, 5):
        conv, x = Conv3x3(8, 8), seeded(batch, 8, size, size)
        with torch.no_grad(), Calls() as calls:
            conv(x, upsample=upsample)
        ways.append(calls.names)
    assert ways[0] == ways[1] == ways[2]


@pytest.mark.parametrize("what", ["float16", "autocast", "strided weight"])
def test_other_types_take_the_library_s_convolution(what):
    conv, x = Conv3x3(8, 8), seeded(1, 8, 8, 8)
    if what == "float16":
        conv, x = conv.half(), x.half()
    if what == "strided weight":
        conv = conv.to(memory_format=NHWC)
    with torch.no_grad(), torch.autocast("cpu", enabled=what == "autocast"), Calls() as calls:
        conv(x)
    assert "convolution" in calls.names
    assert "baddbmm" not in calls.names


def test_convolving_before_upsampling_takes_four_ninths():
    conv = Conv3x3(32, 32)
    with torch.no_grad(), counting_flops() as counter:
        conv(seeded(1, 32, 64, 64), upsample=True)
    whole = 2 * 9 * 32 * 32 * 128 * 128
    assert counter.get_total_flops() == pytest.approx(4 / 9 * whole * (65 / 64) ** 2)


def test_convolution_is_a_convolution_to_others():
    """Hooks, state dicts and whoever looks for nn.Conv2d find what they expect."""
    conv = Conv3x3(8, 12)
    assert isinstance(conv, nn.Conv2d)
    assert {k: tuple(v.shape) for k, v in conv.state_dict().items()} == {
        "weight": (12, 8, 3, 3),
        "bias": (12,),
    }
    seen = []
    conv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    conv(seeded(1, 8, 4, 4))
    assert seen == [(1, 12, 4, 4)]


# ---- what the backward pass keeps -----------------------------------------------------------


def kept_bytes(function, *modules):
    """Bytes that autograd saves, parameters left out."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    weights = {p.untyped_storage()._cdata for m in modules for p in m.parameters()}
    del out
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights)


@pytest.mark.parametrize("resample", [None, "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_block_keeps_what_its_convolutions_read(resample, dtype):
    """And what its norms read: four maps, in the type that they have."""
    block = ResBlock(64, 64, 128, 0.0, True, resample).to(dtype)
    x, emb = seeded(1, 64, 64, 64).to(dtype), seeded(1, 128).to(dtype)
    x.requires_grad_()
    whole, conv = x.nbytes, x.nbytes // (4 if resample else 1)
    expected = whole + 3 * conv  # norm, convolution, norm, convolution
    found = kept_bytes(lambda: block(x, emb), block)
    assert expected <= found < expected + 0.1 * whole


def test_attention_keeps_no_copy_in_float32():
    """In float16 a CPU takes a GPU's way through the norm: by float32, which is not kept."""
    block, kept = AttentionBlock(64, 2, False).half(), []
    x = seeded(1, 64, 16, 16).half().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x, x)
    assert {t.dtype for t in kept if t.numel() >= x.numel()} == {torch.float16}


def test_recomputing_changes_no_gradient(monkeypatch):
    config = UNetConfig.from_preset("tiny")
    gradients = []
    for function in (recomputed, lambda function, *args: function(*args)):
        monkeypatch.setattr("diffbackbone.models.guided_diffusion.recomputed", function)
        unet = filled(UNet(config, 24))
        out = unet.forward_features(seeded(2, 3, 64, 64), 20, (24,))[24]
        out.square().mean().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
    for name, expected in gradients[1].items():
        assert torch.allclose(gradients[0][name], expected, rtol=1e-4, atol=1e-8), name


# ---- the whole U-Net ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "products", "upsampled"), [((24,), 28, 2), ((33, 30, 27, 24), 30, 6)]
)
def test_the_u_net_takes_these_ways(blocks, products, upsampled):
    """At 256 px: channels-last maps, products on small maps, convolutions before upsampling."""
    unet = filled(UNet(UNetConfig.from_preset("tiny"), max(blocks))).eval()
    with torch.no_grad(), Calls() as calls:
        maps = unet.forward_features(seeded(1, 3, 256, 256), 20, blocks)
    assert all(y.is_contiguous(memory_format=NHWC) for y in maps.values())
    # strides 32 and 16 to b=24, then the convolution that upsamples to stride 16, and b=25's first
    assert calls.names.count("baddbmm") == products
    # four up blocks with two paths each; the last two upsample the skip path alone
    assert calls.names.count("upsample_nearest2d") == upsampled
    assert "native_group_norm" not in calls.names[:100]  # large maps come first


def test_a_compiler_gets_the_plain_layers():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    conv = torch.compile(Conv3x3(8, 8), backend=keep, fullgraph=True)
    with torch.no_grad():
        conv(seeded(1, 8, 8, 8))
    assert "conv2d" in graphs[0].code
    assert "baddbmm" not in graphs[0].code
