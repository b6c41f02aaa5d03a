"""Heads: parity with a plain reference, the paper's counts, contracts, errors, kernels."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffbackbone.heads
from diffbackbone import DiffusionBackbone, Feedback, UNet, UNetConfig
from diffbackbone.heads import (
    HEADS,
    AttentionHead,
    CNNHead,
    DifFormerHead,
    LinearHead,
    MLPHead,
    build_head,
    convert_published_head,
)
from diffbackbone.heads.transformer import Attention, Tokenizer

# torch 2.1 and 2.2 have it elsewhere
KERNELS = (getattr(torch.nn, "attention", None) or torch.backends.cuda).SDPBackend
REAL = UNetConfig.from_preset("gd256_uncond")
SMALL = {"width": 32, "num_heads": 4}


def noise(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(golden.normal(name, shape))


def count(head: nn.Module) -> int:
    return sum(p.numel() for p in head.parameters())


def millions(head: nn.Module) -> str:
    return f"{count(head) / 1e6:.1f}"


# ---- the paper's parameter counts -----------------------------------------------------------


@pytest.fixture
def meta():
    with torch.device("meta"):
        yield


def attention(num_classes: int, **options) -> AttentionHead:
    tap = REAL.blocks[24]
    return AttentionHead(tap.channels, num_classes, 256 // tap.stride, **options)


def difformer(num_classes: int) -> DifFormerHead:
    taps = [REAL.blocks[b] for b in (19, 24, 30)]
    channels, sizes = [t.channels for t in taps], [256 // t.stride for t in taps]
    assert (channels, sizes) == ([1024, 1024, 512], [8, 16, 64])
    return DifFormerHead(channels, num_classes, sizes)


def test_attention_counts_of_tables_2_and_15(meta):
    assert [millions(attention(1000, layers=n)) for n in (1, 2, 4)] == ["15.2", "27.8", "53.0"]
    assert millions(attention(50)) == "26.8"
    assert count(attention(1000)) == 27_786_216
    for head in (attention(1000), difformer(1000)):  # what counts can't tell
        assert [block.attn.num_heads for block in head.transformer.blocks] == [8, 8]
    # the same table: SimCLR's ResNet-50, stage 4, 7 x 7 at 224 px
    assert millions(AttentionHead(2048, 50, 7)) == "27.5"


def test_attention_counts_of_table_13(meta):
    heads = [attention(1000, layers=n, pool=4, proj=False) for n in (1, 2, 3, 4, 5)]
    assert [millions(head) for head in heads] == ["13.7", "26.2", "38.8", "51.4", "64.0"]


def test_difformer_counts_of_table_15(meta):
    assert millions(difformer(50)) == "28.9"
    pooled_up = DifFormerHead((1024, 1024, 512), 50, (16, 16, 64))
    assert millions(pooled_up) == "29.3"  # what the table prints


def test_linear_and_mlp_counts_of_table_11(meta):
    linear = [LinearHead(1024, 1000, pool) for pool in (1, 2, 4, 8)]
    assert [head.linear.in_features for head in linear] == [1024, 4096, 16384, 65536]
    assert [count(head) // 10**6 for head in linear] == [1, 4, 16, 65]
    mlp = [
        MLPHead(1024, 1000, hidden, pool)
        for hidden, pool in [((2000,), 1), ((2000,), 2), ((2000, 2000), 2), ((2000,), 4)]
    ]
    assert [count(head) // 10**6 for head in mlp] == [4, 10, 14, 34]
    assert count(MLPHead(1024, 1000)) == count(mlp[-1])
    assert LinearHead(1024, 1000).linear.in_features == 4096


def test_cnn_counts_of_table_12(meta):
    table = {
        (256, 256): 2.5,
        (512, 256): 3.5,
        (1000, 256): 6,
        (1000, 1000): 12,
        (2000, 512): 14,
        (2000, 2000): 32,
        (4000, 2500): 66,
    }
    counts = {hidden: count(CNNHead(1024, 1000, hidden)) / 1e6 for hidden in table}
    assert counts == pytest.approx(table, rel=0.07)
    assert count(CNNHead(1024, 1000)) == 12_099_000
    assert count(CNNHead(1024, 1000, (4000, 2000))) == 56_391_000  # printed: 48M


def test_whole_systems_of_table_8(meta):
    unet, feedback = count(UNet(REAL)), count(Feedback(REAL, "bottleneck"))
    assert round(unet / 1e6) == 553  # without a head
    assert round((unet + count(LinearHead(1024, 1000))) / 1e6) == 557
    assert round((unet + count(difformer(1000))) / 1e6) == 585
    assert round((unet + feedback + count(attention(1000))) / 1e6) == 583
    assert f"{(feedback + count(attention(50))) / 1e6:.1f}" == "29.6"  # Table 15


# ---- parity with a plain reference, through the published names -----------------------------


def published(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights under the published names, all of which matter."""
    state = {}
    for name, shape in shapes.items():
        z = noise(name, *shape)
        norm = ".norm" in name or (name.startswith("pre_layer") and ".1." in name)
        if norm:
            state[name] = 0.3 * z + float(name.endswith("weight"))
        else:
            state[name] = z / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3 * z
    return state


def published_transformer(
    channels: dict[int, int],
    grids: dict[int, tuple[int, int]],
    steps: int,
    layers: int,
    width: int,
    num_classes: int,
) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for b, c in channels.items():
        shapes |= {f"pre_layer.{b}.1.{p}": (c, *grids[b]) for p in ("weight", "bias")}
        shapes |= {f"pre_layer.{b}.2.weight": (width, c, 1, 1), f"pre_layer.{b}.2.bias": (width,)}
    prefix = "intra_inter_block_attention."
    shapes[prefix + "cls_token"] = (1, 1, width)
    for i in range(1, layers + 1):  # entry 0 of the published sequence inserts the CLS token
        layer = f"{prefix}layers.{i}."
        shapes |= {
            layer + f"{n}.{p}": (width,) for n in ("norm1", "norm2") for p in ("weight", "bias")
        }
        shapes |= {
            layer + "attn.qkv.weight": (3 * width, width),
            layer + "attn.proj.weight": (width, width),
            layer + "attn.proj.bias": (width,),
            layer + "mlp.fc1.weight": (4 * width, width),
            layer + "mlp.fc1.bias": (4 * width,),
            layer + "mlp.fc2.weight": (width, 4 * width),
            layer + "mlp.fc2.bias": (width,),
        }
    shapes |= {"head.weight": (num_classes, steps * width), "head.bias": (num_classes,)}
    return published(shapes)


def plain_pool(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling, cell by cell."""
    edges = [
        [(i * n // cells, -(-(i + 1) * n // cells)) for i in range(cells)]
        for n, cells in zip(x.shape[-2:], grid)
    ]
    rows = [
        torch.stack([x[..., a:b, c:d].mean((-2, -1)) for c, d in edges[1]], -1) for a, b in edges[0]
    ]
    return torch.stack(rows, -2)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dims = tuple(range(-weight.ndim, 0))
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def plain_attention(x: Tensor, qkv: Tensor, heads: int) -> Tensor:
    w = qkv.reshape(3, heads, -1, x.shape[-1])
    q, k, v = torch.einsum("nlc,ahdc->anhld", x, w)
    scores = torch.einsum("nhid,nhjd->nhij", q, k) / math.sqrt(q.shape[-1])
    scores = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("nhij,nhjd->nihd", scores, v).flatten(2)


def plain_head(
    state: dict[str, Tensor],
    maps: list[dict[int, Tensor]],
    grids: dict[int, tuple[int, int]],
    heads: int,
) -> Tensor:
    """The published computation, one dict of maps by block for each timestep."""
    prefix = "intra_inter_block_attention."
    layers = len([name for name in state if name.endswith("attn.qkv.weight")])
    cls_tokens = []
    for by_block in maps:
        tokens = [state[prefix + "cls_token"].expand(len(next(iter(by_block.values()))), 1, -1)]
        for b, x in by_block.items():
            p = f"pre_layer.{b}."
            x = plain_norm(plain_pool(x, grids[b]), state[p + "1.weight"], state[p + "1.bias"])
            x = torch.einsum("nchw,oc->nhwo", x, state[p + "2.weight"][..., 0, 0])
            tokens.append(x.flatten(1, 2) + state[p + "2.bias"])
        x = torch.cat(tokens, 1)
        for i in range(1, layers + 1):
            w = {n[len(prefix) :].split(".", 2)[2]: v for n, v in state.items() if f"s.{i}." in n}
            y = plain_norm(x, w["norm1.weight"], w["norm1.bias"])
            y = plain_attention(y, w["attn.qkv.weight"], heads)
            x = x + y @ w["attn.proj.weight"].T + w["attn.proj.bias"]
            y = plain_norm(x, w["norm2.weight"], w["norm2.bias"])
            y = y @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
            x = x + y @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
        cls_tokens.append(x[:, 0])
    return torch.cat(cls_tokens, 1) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize(
    ("size", "pool", "layers"),
    [(8, 16, 1), (16, 16, 2), (32, 16, 1), (6, 4, 4), (7, 3, 2), ((3, 10), 4, 3), ((9, 2), 4, 2)],
)
def test_attention_head_equals_the_reference(size, pool, layers):
    height, width = (size, size) if isinstance(size, int) else size
    grid = {24: (min(height, pool), min(width, pool))}
    state = published_transformer({24: 12}, grid, 1, layers, 32, 5)
    head = AttentionHead(12, 5, size, pool=pool, layers=layers, **SMALL)
    head.load_state_dict(convert_published_head({"model_head": state, "epoch": 1}, head))
    x = noise("map", 2, 12, height, width)
    expected = plain_head(state, [{24: x}], grid, 4)
    assert expected.std() > 0.1
    torch.testing.assert_close(head(x), expected, rtol=0, atol=1e-5)


def test_difformer_equals_the_reference():
    channels, sizes = {19: 12, 24: 12, 30: 6}, {19: 3, 24: 4, 30: (9, 5)}
    grids = {19: (3, 3), 24: (4, 4), 30: (4, 4)}
    timesteps = (300, 90)
    state = published_transformer(channels, grids, 2, 2, 32, 5)
    head = DifFormerHead(
        list(channels.values()), 5, list(sizes.values()), (19, 24, 30), timesteps, pool=4, **SMALL
    )
    head.load_state_dict(convert_published_head(state, head))
    shapes = {19: (12, 3, 3), 24: (12, 4, 4), 30: (6, 9, 5)}
    maps = {(t, b): noise(f"map{t}{b}", 2, *shapes[b]) for t in timesteps for b in shapes}
    plain = [{b: maps[t, b] for b in shapes} for t in timesteps]
    expected = plain_head(state, plain, grids, 4)
    torch.testing.assert_close(head(maps), expected, rtol=0, atol=1e-5)
    shuffled = dict(sorted(maps.items()))
    assert list(shuffled) != list(maps)
    assert torch.equal(head(shuffled), head(maps))
    assert torch.equal(head(list(maps.values())), head(maps))
    other = plain_head(state, plain[::-1], grids, 4)
    assert (expected - other).abs().max() > 0.1  # timesteps are told apart by their order


@pytest.mark.parametrize("pool", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [(4, 4), (9, 5)])
def test_linear_and_mlp_equal_the_reference(pool, size):
    features = 6 * pool * pool
    x = noise("map", 2, 6, *size)
    pooled = plain_pool(x, (pool, pool)).reshape(2, features)
    state = published({"fcs.0.weight": (5, features), "fcs.0.bias": (5,)})
    head = LinearHead(6, 5, pool)
    head.load_state_dict(convert_published_head({"model_head": state}, head))
    expected = pooled @ state["fcs.0.weight"].T + state["fcs.0.bias"]
    torch.testing.assert_close(head(x), expected, rtol=0, atol=1e-5)

    widths = (features, 8, 7, 5)
    state = {}
    for i in range(3):
        state |= published(
            {f"fcs.{i}.weight": widths[i : i + 2][::-1], f"fcs.{i}.bias": (8, 7, 5)[i : i + 1]}
        )
    head = MLPHead(6, 5, (8, 7), pool)
    head.load_state_dict(convert_published_head(state, head))
    y = pooled
    for i in range(3):
        y = (y.clamp(min=0) if i else y) @ state[f"fcs.{i}.weight"].T + state[f"fcs.{i}.bias"]
    torch.testing.assert_close(head(x), y, rtol=0, atol=1e-5)


def test_cnn_equals_the_reference():
    head = golden.fill(CNNHead(6, 5, (8, 7), pool=8))
    x = noise("map", 2, 6, 8, 11)
    y = plain_pool(x, (8, 8))
    for conv in head.convs[::2]:
        patches = y.unfold(2, 2, 2).unfold(3, 2, 2)
        y = torch.einsum("nchwij,ocij->nohw", patches, conv.weight) + conv.bias[:, None, None]
        y = y.clamp(min=0)
    expected = y.flatten(1) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x), expected, rtol=0, atol=1e-5)


def test_published_weights_of_another_head_are_refused():
    fc = published({"fcs.0.weight": (5, 6), "fcs.0.bias": (5,)})
    deep = fc | published({"fcs.1.weight": (5, 5), "fcs.1.bias": (5,)})
    one = published_transformer({24: 6}, {24: (4, 4)}, 1, 1, 32, 5)
    two = published_transformer({24: 6, 30: 6}, {24: (4, 4), 30: (4, 4)}, 1, 1, 32, 5)
    linear, mlp, cnn = LinearHead(6, 5, 1), MLPHead(6, 5, (5,), 1), CNNHead(6, 5, (5, 5), 4)
    head = AttentionHead(6, 5, 4, layers=1, **SMALL)
    for state, target, message in [
        (deep, linear, "those of an MLPHead: 2 layers"),
        (fc, mlp, "those of a LinearHead"),
        (two, head, r"DifFormerHead: blocks \[24, 30\]"),
        (one, linear, "unknown 'pre_layer.24.1.weight'"),
        (fc, head, "AttentionHead: unknown 'fcs.0.weight'"),
        (
            one | {"intra_inter_block_attention.layers.2.0.weight": fc["fcs.0.bias"]},
            head,
            "unknown",
        ),
        (one | {"pre_layer.24.1.running_mean": fc["fcs.0.bias"]}, head, "batch norm"),
        ({}, linear, "because empty"),
        (fc, cnn, "no weights were published for a CNNHead"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert_published_head(state, target)
    other = AttentionHead(6, 5, 3, layers=1, **SMALL)
    converted = convert_published_head(one, other)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(converted)


# ---- contracts that every head keeps --------------------------------------------------------

CASES = {
    "linear": (LinearHead, (6, 3), {}),
    "linear, pooled up": (LinearHead, (6, 3), {"pool": 16}),
    "mlp": (MLPHead, (6, 3), {"hidden": (9, 8), "pool": 2}),
    "cnn": (CNNHead, (6, 3), {"hidden": (9, 8)}),
    "attention": (AttentionHead, (6, 3, (8, 12)), SMALL),
    "attention, pooled": (AttentionHead, (6, 3, (8, 12)), {"pool": 4, **SMALL}),
    "attention, no proj": (
        AttentionHead,
        (6, 3, (8, 12)),
        {"proj": False, "width": 6, "num_heads": 2},
    ),
    "difformer": (
        DifFormerHead,
        ((6, 6), 3, ((8, 12), (8, 12)), (24, 30), (90, 150)),
        {"pool": 9, **SMALL},
    ),
}


@pytest.fixture(params=CASES)
def head(request) -> nn.Module:
    torch.manual_seed(0)
    cls, args, options = CASES[request.param]
    return cls(*args, **options)


def inputs(head: nn.Module, n: int = 2, dtype=torch.float32) -> Tensor | list[Tensor]:
    maps = [noise(f"map{i}", n, 6, 8, 12).to(dtype) for i in range(4)]
    return maps if isinstance(head, DifFormerHead) else maps[0]


def test_gradients_reach_every_parameter_and_the_maps(head):
    maps = inputs(head)
    leaves = [x.requires_grad_() for x in (maps if isinstance(maps, list) else [maps])]
    logits = head(maps)
    assert logits.shape == (2, 3)
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name
    assert all(x.grad.count_nonzero() > 0 for x in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_finite_and_close(head, dtype):
    expected = head(inputs(head))
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(inputs(head, dtype=dtype))
        loss = F.cross_entropy(logits.float(), torch.tensor([0, 2]))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_other_types_are_brought_to_the_weights(head, dtype):
    """Features are cached in half precision; without autocast, too, they go in as they are."""
    logits = head(inputs(head, dtype=dtype))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head(inputs(head)), rtol=0, atol=0.02)
    assert head.to(torch.bfloat16)(inputs(head)).dtype == torch.bfloat16


def test_images_of_a_batch_do_not_meet(head):
    together = head(inputs(head, 3))
    for i in range(3):
        maps = inputs(head, 3)
        single = [x[i : i + 1] for x in maps] if isinstance(maps, list) else maps[i : i + 1]
        torch.testing.assert_close(head(single), together[i : i + 1], rtol=0, atol=1e-5)


def test_a_head_can_learn(head):
    """Three classes that differ in where a spot sits, or in its channel."""
    x = 0.1 * noise("background", 12, 6, 8, 12)
    labels = torch.arange(12) % 3
    for i, label in enumerate(labels.tolist()):
        x[i, 2 * label, 4 * (label > 1) : 4 * (label > 1) + 4, 4 * label : 4 * label + 4] += 2
    maps = [x] * 4 if isinstance(head, DifFormerHead) else x
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(head(maps), labels).backward()
        optimizer.step()
    assert (head(maps).argmax(1) == labels).all()


def test_the_maps_are_left_as_they_are(head):
    maps = inputs(head)
    before = [x.clone() for x in maps]
    with torch.no_grad():
        head(maps)
    assert all(torch.equal(a, b) for a, b in zip(maps, before))


def test_channels_last_maps_give_the_same(head):
    maps = inputs(head)
    last = torch.channels_last
    other = (
        [x.contiguous(memory_format=last) for x in maps]
        if isinstance(maps, list)
        else maps.contiguous(memory_format=last)
    )
    torch.testing.assert_close(head(other), head(maps), rtol=0, atol=1e-5)


# ---- initial values -------------------------------------------------------------------------


def test_initial_values_are_the_published_codes():
    torch.manual_seed(0)
    head = DifFormerHead((48, 24), 50, (8, 16), (24, 30), (90, 150), width=64)
    seen = 0
    for name, module in head.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
            assert module.eps == 1e-5
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = module.weight[0].numel() ** -0.5
            for value in module.parameters():
                assert value.abs().max() <= bound, name
            assert 0.95 * bound < module.weight.abs().max(), name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
            seen += 1
    assert seen == 2 + 2 * 5 + 1
    assert not head.transformer.cls_token.any()
    assert {name for name, _ in head.named_buffers()} == set()


# ---- sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "grid"),
    [(8, (8, 8)), (16, (16, 16)), (64, (16, 16)), ((5, 40), (5, 16)), ((20, 3), (16, 3))],
)
def test_maps_are_pooled_down_and_never_up(size, grid):
    tokenizer = Tokenizer(6, size, 10, pool=16)
    height, width = (size, size) if isinstance(size, int) else size
    assert tokenizer.grid == grid
    assert tokenizer.norm.weight.shape == (6, *grid)
    x = noise("map", 2, 6, height, width)
    tokens = tokenizer(x)
    assert tokens.shape == (2, grid[0] * grid[1], 10)
    pooled = tokenizer.proj(tokenizer.norm(plain_pool(x, grid)))
    torch.testing.assert_close(tokens[:, grid[1] - 1], pooled[:, :, 0, -1], rtol=0, atol=1e-5)


def test_a_pooled_map_gives_what_the_map_gives():
    """So that features can be cached pooled."""
    head = AttentionHead(6, 5, (64, 40), **SMALL)
    x = noise("map", 2, 6, 64, 40)
    torch.testing.assert_close(head(F.adaptive_avg_pool2d(x, 16)), head(x), rtol=0, atol=1e-5)
    assert head(noise("other", 1, 6, 33, 16)).shape == (1, 5)


def test_a_map_of_another_size_is_refused_and_the_error_says_what_fits():
    head = AttentionHead(6, 5, (8, 64), **SMALL)
    head(torch.zeros(1, 6, 8, 16))
    fits = "a height of 8 and a width of at least 16 would fit"
    for size in [(16, 64), (9, 64), (7, 64), (8, 15), (64, 8)]:
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}, but .* 8 x 16 .*{fits}"):
            head(torch.zeros(1, 6, *size))


# ---- with the backbone ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (80, 72)])
@pytest.mark.parametrize("feedback", [None, "bottleneck"])
def test_difformer_takes_what_forward_taps_returns(size, feedback):
    blocks, timesteps = (19, 24, 30), (90, 300)
    unet = golden.fill(UNet(UNetConfig.from_preset("tiny"), 36))
    backbone = DiffusionBackbone(
        unet, blocks=blocks, feedback=feedback, out_channels=None, out_strides=None, freeze=True
    )
    head = DifFormerHead(
        backbone.channels,
        3,
        [tuple(math.ceil(n / stride) for n in size) for stride in backbone.strides],
        blocks,
        timesteps,
        pool=4,
        **SMALL,
    )
    images = noise("images", 1, 3, *size).clamp(-1, 1)
    taps = backbone.forward_taps(images, timesteps)
    head(taps).sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    trained = [] if feedback is None else list(backbone.feedback.parameters())
    assert all(p.grad is not None and p.grad.any() for p in trained)
    single = AttentionHead(backbone.channels[1], 3, head.tokenizers["24"].grid, pool=4, **SMALL)
    assert single(taps[90, 24]).shape == (1, 3)
    with pytest.raises(ValueError, match="got a list"):
        single(backbone(images))


# ---- kernels --------------------------------------------------------------------------------


@pytest.fixture
def attention_calls(monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention

    def record(q, k, v, **options):
        assert not options
        calls.append((q, k, v))
        return original(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_takes_the_fast_kernel(attention_calls, autocast, memory_format):
    head = AttentionHead(6, 3, 8, layers=3, **SMALL)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        head(noise("map", 2, 6, 8, 8).contiguous(memory_format=memory_format))
    assert len(attention_calls) == 3
    for q, k, v in attention_calls:
        assert [x.stride(-1) for x in (q, k, v)] == [1, 1, 1]
        assert k.shape == v.shape == (2, 4, 65, 8)
        assert torch._fused_sdp_choice(q, k, v) == KERNELS.FLASH_ATTENTION.value
        crooked = k.transpose(-2, -1).contiguous().transpose(-2, -1)
        assert torch._fused_sdp_choice(q, crooked, v) == KERNELS.MATH.value  # it could fail
    # only the CLS token leaves the last block, so only that one asks there
    assert [q.shape[2] for q, _, _ in attention_calls] == [65, 65, 1]


def test_few_queries_give_the_first_of_all():
    layer = golden.fill(Attention(32, 4))
    x = noise("tokens", 2, 9, 32)
    torch.testing.assert_close(layer(x, 3), layer(x)[:, :3], rtol=0, atol=1e-6)


# ---- errors ---------------------------------------------------------------------------------

WRONG_ARGUMENTS = [
    (LinearHead, (0, 5), {}, "in_channels must be a positive integer, got 0"),
    (LinearHead, (6, 0), {}, "num_classes must be a positive integer, got 0"),
    (LinearHead, (6, True), {}, "num_classes"),
    (LinearHead, (6, 5.0), {}, "num_classes"),
    (LinearHead, (6, 5, 0), {}, "pool"),
    (MLPHead, (6, 0), {}, "num_classes"),
    (MLPHead, (6, 5, ()), {}, "LinearHead has no hidden layer"),
    (MLPHead, (6, 5, (8, 0)), {}, "hidden must be a positive integer, got 0"),
    (CNNHead, (6, -1), {}, "num_classes"),
    (CNNHead, (6, 5, ()), {}, "at least one convolution"),
    (CNNHead, (6, 5, (0,)), {}, "hidden"),
    (CNNHead, (6, 5, (8, 8), 6), {}, "pool must be a multiple of 4 for 2 convolutions"),
    (AttentionHead, (6, 0, 8), {}, "num_classes"),
    (AttentionHead, (0, 5, 8), {}, "in_channels"),
    (AttentionHead, (6, 5, 0), {}, "size must be a positive integer, got 0"),
    (AttentionHead, (6, 5, (8, -1)), {}, "size must be a positive integer, got -1"),
    (AttentionHead, (6, 5, (0, 8)), {}, "size must be a positive integer, got 0"),
    (AttentionHead, (6, 5, (8, 8, 8)), {}, r"size must be an integer or \(height, width\)"),
    (AttentionHead, (6, 5, 8.0), {}, "size"),
    (AttentionHead, (6, 5, 8), {"pool": 0}, "pool"),
    (AttentionHead, (6, 5, 8), {"layers": 0}, "layers must be a positive integer, got 0"),
    (
        AttentionHead,
        (6, 5, 8),
        {"width": 30, "num_heads": 4},
        "num_heads=4 does not divide width=30",
    ),
    (AttentionHead, (6, 5, 8), {"num_heads": 0}, "num_heads"),
    (AttentionHead, (6, 5, 8), {"mlp_ratio": 0.0}, "mlp_ratio=0.0 leaves no hidden channel"),
    (AttentionHead, (6, 5, 8), {"proj": False}, "width must be 6, got 1024"),
    (DifFormerHead, ((6,) * 3, 0, (8,) * 3), {}, "num_classes"),
    (DifFormerHead, ((6, 6), 5, (8,) * 3), {}, r"in_channels .* 3 blocks \(19, 24, 30\), got 2"),
    (DifFormerHead, ((6,) * 3, 5, (8, 8)), {}, "sizes must have one entry for each .* got 2"),
    (DifFormerHead, (6, 5, (8,) * 3), {}, "in_channels .* got 6"),
    (DifFormerHead, ((6,) * 3, 5, (8,) * 3, (19, 24, 24)), {}, "blocks must be one or more diff"),
    (DifFormerHead, ((), 5, (), ()), {}, "blocks must be one or more"),
    (DifFormerHead, ((6,), 5, (8,), (24,), ()), {}, "timesteps must be one or more"),
    (DifFormerHead, ((6,), 5, (8,), (24,), (90, 90)), {}, "timesteps must be one or more"),
    (DifFormerHead, ((6,), 5, (8,), (24,), (-1,)), {}, "timesteps must be integers from 0"),
    (DifFormerHead, ((6,), 5, (8,), (24,), 90), {}, "timesteps must be a sequence"),
    (DifFormerHead, ((6,), 5, (8,), ("24",)), {}, "blocks must be integers"),
]


@pytest.mark.parametrize(("cls", "args", "options", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments(cls, args, options, message, meta):
    with pytest.raises(ValueError, match=message):
        cls(*args, **options)


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "attention"])
def test_maps_of_the_wrong_kind(name):
    cls, args, options = CASES[name]
    head = cls(*args, **options)
    for wrong, message in [
        (torch.zeros(2, 7, 8, 12), r"\(N, 6, H, W\) .* got \(2, 7, 8, 12\)"),
        (torch.zeros(2, 6), r"got \(2, 6\)"),
        (torch.zeros(6, 8, 12), r"got \(6, 8, 12\)"),
        (torch.zeros(2, 6, 8, 12, dtype=torch.uint8), "got a tensor of torch.uint8"),
        ([torch.zeros(2, 6, 8, 12)], "got a list"),
    ]:
        with pytest.raises(ValueError, match=message):
            head(wrong)


def test_difformer_refuses_maps_that_do_not_belong():
    head = DifFormerHead((6, 4), 3, (8, 8), (24, 30), (90, 150), **SMALL)

    def tap(t: int, b: int) -> Tensor:
        return torch.zeros(2, 6 if b == 24 else 4, 8, 8)

    good = {(t, b): tap(t, b) for t in (90, 150) for b in (24, 30)}
    assert head(good).shape == (2, 3)
    missing = {key: x for key, x in good.items() if key != (150, 24)}
    for wrong, message in [
        (missing, r"there are \[\(150, 24\)\] missing and \[\] too many"),
        (good | {(300, 24): tap(300, 24)}, r"\[\] missing and \[\(300, 24\)\] too many"),
        ({(b, t): x for (t, b), x in good.items()}, r"keys \(t, b\)"),
        (list(good.values())[:3], r"needs 4 maps: blocks \(24, 30\) at timesteps .* got 3"),
        (list(good.values()) * 2, r"in the order \[\(90, 24\), \(90, 30\), .* got 8"),
        ([], "got 0"),
        (tap(90, 24), "got Tensor"),
        (good | {(150, 30): torch.zeros(2, 6, 8, 8)}, r"the map of t=150, b=30 must be \(N, 4,"),
        (good | {(150, 30): torch.zeros(2, 4, 9, 8)}, "the map of t=150, b=30 is 9 x 8"),
        (good | {(150, 30): torch.zeros(1, 4, 8, 8)}, r"batches of different sizes: \[1, 2\]"),
        (good | {(90, 30): None}, "the map of t=90, b=30 .* got a NoneType"),
    ]:
        with pytest.raises(ValueError, match=message):
            head(wrong)


# ---- by name --------------------------------------------------------------------------------


def test_build_head_by_name():
    assert list(HEADS) == ["linear", "mlp", "cnn", "attention", "difformer"]
    assert build_head("linear", 6, 5, pool=3).linear.in_features == 54
    head = build_head("attention", in_channels=6, num_classes=5, size=8, layers=1, **SMALL)
    assert isinstance(head, AttentionHead)
    assert len(head.transformer.blocks) == 1
    with pytest.raises(ValueError, match="'Linear'; choose from linear, mlp, cnn, attention, diff"):
        build_head("Linear", 6, 5)
    with pytest.raises(ValueError, match="'linear': .*'layers'; its options are in_channels, num_"):
        build_head("linear", 6, 5, layers=2)
    with pytest.raises(ValueError, match="'attention': .*'size'"):
        build_head("attention", 6, 5)
    with pytest.raises(ValueError, match="num_classes must be a positive integer"):
        build_head("mlp", 6, 0)


def test_heads_import_torch_and_siblings_alone():
    allowed = ("__future__", "collections", "inspect", "re", "typing", "torch")
    folder = Path(diffbackbone.heads.__file__).parent
    files = sorted(folder.glob("*.py"))
    assert len(files) > 6
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module]
            for name in names:
                sibling = name.startswith("diffbackbone.heads")
                assert sibling or name.split(".")[0] in allowed, f"{file.name}: {name}"
