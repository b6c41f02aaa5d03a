"""Layers against the plain ones that they stand for; which way is taken; what stays in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffbackbone.costs import LiveTensors
from diffbackbone.models import ops
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import AttentionBlock, UNet
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
    """The operators that ran."""

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
def test_norm_is_norm_scale_shift_silu(grad, memory_format, rows, silu, monkeypatch):
    monkeypatch.setattr(ops, "CACHED", 64 * 1000)  # 96 x 50 positions are five pieces, one smaller
    norm = filled(GroupNorm32(64))
    x = seeded(2, 64, 96, 50, offset=3.0).to(memory_format=memory_format)
    embedded = [seeded(rows, 64, seed=i) for i in (1, 2)] if rows else []
    before = x.clone()
    with torch.set_grad_enabled(grad), Calls() as calls:
        y = norm(x, *embedded, silu=silu)
    assert error(y, exact_norm(norm, x, *embedded, silu=silu)) < 1e-6
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(x, before)
    if not grad:  # one row of scale costs no pass over the map
        assert sum(name in ("mul_", "add_") for name in calls.names) == (2 if rows == 2 else 0)


def test_norm_of_a_large_map_is_accurate():
    """Torch's own kernel is not, channels-last: it adds up a million values one by one."""
    norm = filled(GroupNorm32(32))
    x = seeded(1, 32, 512, 512, offset=1.5).to(memory_format=NHWC)
    exact = exact_norm(norm, x)
    with torch.no_grad():
        assert error(norm(x), exact) < 2e-6
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
@pytest.mark.parametrize("chunk", [2 * 30 * 24 * 20, 2**25])
def test_norm_in_half_precision(dtype, memory_format, chunk, monkeypatch):
    """A GPU's kernel needs float32 input, a few groups at a time; float16 on a CPU too."""
    monkeypatch.setattr(ops, "NORM_CHUNK", chunk)
    norm = filled(GroupNorm32(64))
    x = seeded(2, 64, 24, 20, offset=200.0).to(dtype)  # squares add up to more than float16 holds
    x = x.to(memory_format=memory_format)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = norm(x, silu=True)
        assert y.dtype == dtype
        assert error(y, exact_norm(norm, x, silu=True)) < 2 * torch.finfo(dtype).eps


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


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (3, 70), (17, 16), (31, 37)])
@pytest.mark.parametrize("large", [0, ops.LARGE_WEIGHT])
def test_convolution_is_the_plain_one(upsample, memory_format, shape, large, monkeypatch):
    monkeypatch.setattr(ops, "LARGE_WEIGHT", large)
    conv = filled(Conv3x3(24, 40))
    x = seeded(2, 24, *shape).to(memory_format=memory_format).requires_grad_()
    exact = plain(conv, x, upsample)
    with torch.no_grad():
        y = conv(x, upsample=upsample)
    assert y.shape == (2, 40, *(2 * s if upsample else s for s in shape))
    assert error(y, exact) < 2e-6
    y = conv(x, upsample=upsample)
    assert error(y, exact) < 2e-6
    direction, leaves = seeded(*y.shape, seed=1), (x, conv.weight, conv.bias)
    ours = torch.autograd.grad(y, leaves, direction)
    for a, b in zip(ours, torch.autograd.grad(exact, leaves, direction.double())):
        assert error(a, b.double()) < 5e-6


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("large", [0, ops.LARGE_WEIGHT])
def test_convolution_in_bfloat16(upsample, size, large, monkeypatch):
    monkeypatch.setattr(ops, "LARGE_WEIGHT", large)
    conv, x = filled(Conv3x3(24, 40)).bfloat16(), seeded(1, 24, size, size).bfloat16()
    with torch.no_grad(), Calls() as calls:
        y = conv(x, upsample=upsample)
    assert y.dtype == torch.bfloat16
    assert error(y, plain(conv, x, upsample)) < 2 * torch.finfo(torch.bfloat16).eps
    assert ("baddbmm" in calls.names) == (size == 8 and not large)
    assert ("upsample_nearest2d" in calls.names) == upsample  # sums of rounded weights lose digits


@pytest.mark.parametrize(
    ("size", "upsample", "channels", "kernel"),
    [
        (16, False, 1024, "baddbmm"),
        (16, False, 960, "convolution"),
        (17, False, 1024, "convolution"),
        (8, True, 1024, "baddbmm"),
        (16, True, 1024, "convolution"),
        (32, True, 8, "convolution"),
    ],
)
def test_large_weights_on_small_maps_are_one_matrix_product(size, upsample, channels, kernel):
    conv, ways = Conv3x3(channels, channels // 2), []
    for batch in (1, 3):  # an image's maps must not depend on the others of its batch
        x = seeded(batch, channels, size, size)
        with torch.no_grad(), Calls() as calls:
            conv(x, upsample=upsample)
        ways.append(calls.names)
    assert {"baddbmm", "convolution"} & set(ways[0]) == {kernel}
    assert ("upsample_nearest2d" in ways[0]) == (upsample and size < 32)
    assert ways[0] == ways[1]


@pytest.mark.parametrize("size", [16, 17])
def test_small_channels_last_maps_are_convolved_contiguous(size, monkeypatch):
    """On some processors oneDNN is off by 3e-6 on channels-last maps, else by 4e-7."""
    conv, x = Conv3x3(8, 8), seeded(2, 8, size, size).to(memory_format=NHWC)
    given = []
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *args: given.append(x) or convolve(x, *args))
    with torch.no_grad():
        y = conv(x)
    assert given[0].is_contiguous() == (size == 16)
    assert y.is_contiguous(memory_format=NHWC)


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


# ---- what the backward pass keeps -----------------------------------------------------------


def test_attention_keeps_no_copy_in_float32():
    """In float16 a CPU takes a GPU's way through the norm: by float32, which is not kept."""
    block, kept = AttentionBlock(64, 2, False).half(), []
    x = seeded(1, 64, 16, 16).half().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x, x)
    assert {t.dtype for t in kept if t.numel() >= x.numel()} == {torch.float16}


# ---- the whole U-Net ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "products", "upsampled"), [((24,), 28, 2), ((33, 30, 27, 24), 30, 6)]
)
def test_the_u_net_takes_these_ways(blocks, products, upsampled, monkeypatch):
    """At 256 px: channels-last maps, products on small maps, convolutions before upsampling."""
    monkeypatch.setattr(ops, "LARGE_WEIGHT", 0)  # as gd256's weights of these layers are
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
