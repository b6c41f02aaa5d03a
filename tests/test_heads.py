"""Heads: parity with a plain reference, the paper's counts, contracts, kernels."""

from __future__ import annotations

import itertools

import golden
import pytest
import torch
import torch.nn.functional as F
from published import published_names
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from diffbackbone import Feedback, UNet, UNetConfig
from diffbackbone.heads import (
    AttentionHead,
    CNNHead,
    DifFormerHead,
    LinearHead,
    MLPHead,
    build_head,
    convert_published_feedback,
    convert_published_head,
    published_options,
)

REAL = UNetConfig.from_preset("gd256_uncond")
SMALL = {"width": 32, "num_heads": 4}
CLOSE = {"rtol": 0, "atol": 1e-5}


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
    return AttentionHead(1024, num_classes, 16, **options)


def difformer(num_classes: int) -> DifFormerHead:
    return DifFormerHead((1024, 1024, 512), num_classes, (8, 16, 64))


def test_counts_of_tables_2_13_and_15(meta):
    assert [millions(attention(1000, layers=n)) for n in (1, 2, 4)] == ["15.2", "27.8", "53.0"]
    table_13 = [attention(1000, layers=n, pool=4, proj=False) for n in (1, 2, 3, 4, 5)]
    assert [millions(head) for head in table_13] == ["13.7", "26.2", "38.8", "51.4", "64.0"]
    assert (millions(attention(50)), millions(difformer(50))) == ("26.8", "28.9")
    assert count(attention(1000)) == 27_786_216
    for head in (attention(1000), difformer(1000)):  # what counts can't tell
        assert [block.attn.num_heads for block in head.transformer.blocks] == [8, 8]


def test_linear_and_mlp_counts_of_table_11(meta):
    linear = [LinearHead(1024, 1000, pool) for pool in (1, 2, 4, 8)]
    assert [head.linear.in_features for head in linear] == [1024, 4096, 16384, 65536]
    assert [count(head) // 10**6 for head in linear] == [1, 4, 16, 65]
    mlp = [
        MLPHead(1024, 1000, hidden, pool)
        for hidden, pool in [((2000,), 1), ((2000,), 2), ((2000, 2000), 2), ((2000,), 4)]
    ]
    assert [count(head) // 10**6 for head in mlp] == [4, 10, 14, 34]
    assert count(MLPHead(1024, 1000)) == count(mlp[-1])  # the default


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


# ---- parity with the authors' code, through the published names -----------------------------

INSERT = "Use_CLS_Token:True:16,Insert_CLS_Token,Attention:16:4:1.5:2,"
PLAIN = "Use_CLS_Token:True:16,Attention:16:4:4:2,"
FLAGS = "--t_list 150 --first_fw_b_list 24 --second_fw_b_list -1 --feedback_b_list -1"
BOTH = "--t_list 90 150 --first_fw_b_list 19 24 --second_fw_b_list 24 30 --feedback_b_list 21 24"
OPTIONS = {  # logits of two images, by the authors' code
    f"{FLAGS} --norm_type batch --fusion_arc {INSERT}Extract_CLS_Token": (
        [-0.14002, -3.40459, -0.24016], [-0.74752, -3.79188, 0.9257],
    ),
    f"{FLAGS} --norm_type layer --fusion_arc {INSERT}FullyPool": (
        [-2.06154, -3.68716, 1.7294], [-2.12926, -3.66293, 2.55165],
    ),
    f"{FLAGS} --norm_type layer --fusion_arc {PLAIN}FullyPool": (
        [-0.97492, 1.38714, 0.05234], [0.20096, 2.00601, 0.54995],
    ),
    f"{FLAGS} --fusion_arc {INSERT}Extract_CLS_Token,Dense:16:24:relu,Dense:24:16:tanh": (
        [0.14478, 0.11675, -0.42816], [0.55223, -0.0161, -0.963],
    ),
    f"{FLAGS} --norm_type batch --fusion_arc {PLAIN}Flatten,Dense:256:16:sigmoid": (
        [-0.71535, 0.99773, 0.87003], [-0.28233, 1.09206, 0.00461],
    ),
    f"{BOTH} --fusion_arc {INSERT}Extract_CLS_Token": (
        [-3.12215, 3.08828, -2.7781], [-3.14521, 2.33939, -2.2697],
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", OPTIONS, ids=lambda flags: flags.split("_type ")[-1][-60:])
def test_published_options_give_the_published_logits(flags):
    options, shapes = published_options(flags + " --pre_pool_size 4"), {
        19: (12, 3, 3), 24: (12, 6, 6), 30: (6, 6, 6)
    }  # fmt: skip
    given, both = options["head_options"] | {"pool": options["pool"]}, bool(options["first_blocks"])
    if both:
        taps = {name: options[name] for name in ("blocks", "timesteps", "first_blocks")}
        head = build_head("difformer", (12, 6, 12), 3, (6, 6, 3), **taps, **given)
    else:
        head = build_head(options["head"], 12, 3, 6, **given)
    names = published_names(head)
    state = {name: golden.value(name, tuple(v.shape)) for name, v in names.items()}
    head.load_state_dict(convert_published_head({"model_head": state}, head.eval()))
    maps = {
        (t, b, *mark): noise(f"{mark[0] if mark else 'second'}.{t}.{b}", 2, *shapes[b])
        for t in options["timesteps"]
        for blocks, mark in ((options["first_blocks"], ("first",)), (options["blocks"], ()))
        for b in blocks
    }
    x = maps if both else noise("first.150.24", 2, *shapes[24])
    torch.testing.assert_close(head(x), torch.tensor(OPTIONS[flags]), rtol=0, atol=2e-5)
    if not both:
        return
    assert torch.equal(head(dict(sorted(maps.items(), key=str))), head(maps))
    assert torch.equal(head(list(maps.values())), head(maps))
    first = next(iter(maps))
    for wrong, error in (
        (list(maps.values())[1:], ValueError),
        ({tap: x for tap, x in maps.items() if tap != first}, KeyError),
        (maps | {first: maps[first][:1]}, RuntimeError),
    ):
        with pytest.raises(error):
            head(wrong)


@pytest.mark.parametrize(
    ("size", "grid"),
    [(8, (8, 8)), (32, (16, 16)), ((3, 20), (3, 16)), ((19, 2), (16, 2))],
)
def test_maps_are_pooled_down_to_16_and_never_up(size, grid):
    """Features can be cached pooled."""
    head = golden.fill(AttentionHead(12, 5, size, **SMALL))
    assert head.tokenizer.norm.weight.shape == (12, *grid)
    x = noise("map", 2, 12, *((size, size) if isinstance(size, int) else size))
    torch.testing.assert_close(head(F.adaptive_avg_pool2d(x, grid)), head(x), **CLOSE)


def test_published_options():
    options = published_options(f"{BOTH} --fusion_arc {INSERT}Extract_CLS_Token --lr 1 --x")
    assert (options["timesteps"], options["blocks"], options["first_blocks"]) == (
        (90, 150), (24, 30), (19, 24),
    )  # fmt: skip
    assert (options["head"], options["feedback"]) == ("difformer", {21: 17, 24: 14})
    assert options["feedback_layers"] == ("conv", "batch", "relu")
    assert published_options(BOTH.replace("21 24", "24 21") + f" --fusion_arc {INSERT}FullyPool")[
        "feedback"
    ] == {24: 17, 21: 14}  # in reverse order there
    for arch, layers in {
        "C_G_S_C": ("conv", "group", "silu", "depthwise"),
        "B_C": ("batch", "depthwise"),
        "C2_Res": ("conv", "relu"),
    }.items():
        flags = f"{BOTH} --fusion_arc {INSERT}FullyPool --feedback_arch {arch}"
        assert published_options(flags)["feedback_layers"] == layers
    options = published_options(f"{FLAGS} --head_type linear --head_arc 8_7 --pre_pool_size 2")
    assert (options["head"], options["hidden"], options["pool"]) == ("mlp", (8, 7), 2)
    assert published_options(f"{FLAGS} --head_type linear")["head"] == "linear"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--t_list 150", "first_fw_b_list"),
        (f"{FLAGS} --fusion_arc {INSERT}", "'' is not supported"),
        (f"{FLAGS} --fusion_arc {INSERT}FullPool", "'FullPool' is not supported"),
        (f"{FLAGS} --fusion_arc {INSERT[:-1]}", "needs .* a readout"),
        (f"{FLAGS} --fusion_arc {INSERT}Attention:16:8:1.5:1,FullyPool", "blocks that differ"),
        (f"{FLAGS} --mode finetune --head_type linear", "--mode finetune"),
        (f"{FLAGS.replace('24', '30 24')} --fusion_arc {INSERT}FullyPool", "must ascend"),
    ],
)
def test_published_options_that_cannot_be_used(flags, message):
    with pytest.raises(ValueError, match=message):
        published_options(flags)


def test_published_feedback_layers_are_named_by_their_source():
    weights = {"0.0.weight": 1, "1.0.weight": 2, "1.1.bias": 3}
    expected = {"24.0.weight": 1, "21.0.weight": 2, "21.1.bias": 3}
    assert convert_published_feedback(weights, {24: 17, 21: 14}) == expected
    with pytest.raises(ValueError, match="layers 1 have no source"):
        convert_published_feedback(weights, [24])


@pytest.mark.parametrize("pool", [1, 3])
def test_linear_and_mlp_equal_the_reference(pool):
    x = noise("map", 2, 6, 9, 5)
    pooled = F.adaptive_avg_pool2d(x, pool).flatten(1)
    for widths in ((6 * pool**2, 5), (6 * pool**2, 8, 7, 5)):
        state, y = {}, pooled
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            weight, bias = noise(f"w{i}", fan_out, fan_in), noise(f"b{i}", fan_out)
            state |= {f"fcs.{i}.weight": weight, f"fcs.{i}.bias": bias}
            y = F.linear(y.relu() if i else y, weight, bias)
        head = LinearHead(6, 5, pool) if len(widths) == 2 else MLPHead(6, 5, widths[1:-1], pool)
        head.load_state_dict(convert_published_head({"model_head": state}, head))
        torch.testing.assert_close(head(x), y, rtol=1e-4, atol=1e-4)


def test_cnn_equals_the_reference():
    head = golden.fill(CNNHead(6, 5, (8, 7), pool=8))
    x = noise("map", 2, 6, 8, 11)
    y = F.adaptive_avg_pool2d(x, 8)
    for conv in head.convs[::2]:
        y = F.conv2d(y, conv.weight, conv.bias, stride=2).relu()
    torch.testing.assert_close(head(x), head.linear(y.flatten(1)), **CLOSE)


def test_published_weights_of_another_head_are_refused():
    fc = {"fcs.0.weight": torch.zeros(5, 6), "fcs.0.bias": torch.zeros(5)}
    deep = fc | {"fcs.1.weight": torch.zeros(5, 5), "fcs.1.bias": torch.zeros(5)}
    linear, head = LinearHead(6, 5, 1), AttentionHead(6, 5, 4, layers=1, **SMALL)
    one = published_names(head)
    two = published_names(DifFormerHead((6, 6), 5, (4, 4), (24, 30), (90,), layers=1, **SMALL))
    batch_norm = one | {"pre_layer.24.1.running_mean": torch.zeros(5)}
    for state, target in [
        (deep, linear), (two, head), (one, linear), (fc, head), (batch_norm, head),
        (fc, CNNHead(6, 5, (5, 5), 4)),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"not weights of a {type(target).__name__}"):
            convert_published_head(state, target)
    for state, target in [({}, linear), (fc, MLPHead(6, 5, (5,), 1))]:
        with pytest.raises((ValueError, RuntimeError)):
            target.load_state_dict(convert_published_head(state, target))


# ---- contracts that every head keeps --------------------------------------------------------

CASES = {
    "linear": lambda: LinearHead(6, 3),
    "mlp": lambda: MLPHead(6, 3, (9, 8), 2),
    "cnn": lambda: CNNHead(6, 3, (9, 8)),
    "attention": lambda: AttentionHead(6, 3, (8, 12), pool=4, **SMALL),
    "attention, no proj": lambda: AttentionHead(6, 3, (8, 12), proj=False, num_heads=2),
    "attention, options": lambda: AttentionHead(
        6, 3, (8, 12), 4, norm="batch", readout="mean", dense=[(32, 9, "tanh")], **SMALL
    ),
    "difformer": lambda: DifFormerHead(
        (6, 6), 3, ((8, 12), (8, 12)), (24, 30), (90, 150), 9, **SMALL
    ),
}


@pytest.fixture(params=CASES)
def head(request) -> nn.Module:
    torch.manual_seed(0)
    return CASES[request.param]()


def inputs(head: nn.Module, dtype=torch.float32) -> Tensor | list[Tensor]:
    maps = [noise(f"map{i}", 2, 6, 8, 12).to(dtype) for i in range(4)]
    return maps if isinstance(head, DifFormerHead) else maps[0]


def test_gradients_reach_every_parameter_and_the_maps(head):
    maps = inputs(head)
    leaves = [x.requires_grad_() for x in (maps if isinstance(maps, list) else [maps])]
    before = [x.detach().clone() for x in leaves]
    logits = head(maps)
    assert logits.shape == (2, 3)
    assert not any(p.any() for name, p in head.named_parameters() if name.endswith("cls_token"))
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name
    assert all(x.grad.count_nonzero() > 0 for x in leaves)
    assert all(torch.equal(x, y) for x, y in zip(leaves, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_cached_types(head, dtype):
    """Features are cached in half precision; without autocast, too, they go in as they are."""
    expected = head(inputs(head))
    logits = head(inputs(head, dtype))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(inputs(head, dtype))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05)
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("size", [(16, 64), (9, 64), (7, 64), (8, 15), (64, 8)])
def test_map_of_another_grid_is_an_error(size):
    head = AttentionHead(6, 5, (8, 64), **SMALL)
    head(torch.zeros(1, 6, 8, 16))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        head(torch.zeros(1, 6, *size))


# ---- kernels --------------------------------------------------------------------------------


@pytest.fixture
def attention_calls(monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention

    def record(q, k, v):
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
        assert torch._fused_sdp_choice(q, k, v) == SDPBackend.FLASH_ATTENTION.value
        crooked = k.transpose(-2, -1).contiguous().transpose(-2, -1)
        assert torch._fused_sdp_choice(q, crooked, v) == SDPBackend.MATH.value  # it could fail
    # only the CLS token leaves the last block, so only that one asks there
    assert [q.shape[2] for q, _, _ in attention_calls] == [65, 65, 1]


# ---- by name --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "options", "message"),
    [
        ("Linear", (6, 5), {}, "choose from linear, mlp"),
        ("linear", (6, 5), {"layers": 2}, "LinearHead.*'layers'"),
        ("attention", (6, 5, 8), {"width": 30}, "num_heads=8 does not divide width=30"),
        ("attention", (6, 5, 8), {"readout": "max"}, "unknown readout 'max'"),
        ("cnn", (6, 5, (8, 8), 6), {}, "multiple of 4, got 6"),
        ("difformer", ((6, 6), 5, (8,) * 3), {}, "shorter"),
        ("difformer", ((6,) * 3, 5, (8,) * 3, (19, 24, 24)), {}, "longer"),
    ],
)
def test_wrong_options(name, args, options, message, meta):
    with pytest.raises((ValueError, TypeError), match=message):
        build_head(name, *args, **options)
