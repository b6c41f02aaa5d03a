"""DifFeed: parity, strategies, what runs twice and what does not, gradients."""

from __future__ import annotations

from collections import Counter

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffbackbone import DiffusionBackbone, Feedback, UNet, UNetConfig
from diffbackbone.feedback import STRATEGIES, feedback_map

SMALL = golden.CONFIGS["narrow256"]
REAL = UNetConfig.from_preset("gd256_uncond")


@pytest.fixture(scope="module")
def small() -> UNet:
    return golden.fill(UNet(SMALL))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_pass_equals_the_authors_code(strategy, small):
    feedback = golden.fill(Feedback(SMALL, strategy), "feedback.")
    taps = (24,) if strategy == "multi-scale" else (24, 27, 30, 33)
    with np.load(golden.FILE) as reference, torch.no_grad():
        features = feedback(small, golden.image("narrow256"), golden.T, taps)
        errors = {
            b: golden.relative_error(x, reference, f"narrow256/{strategy}/b{b}")
            for b, x in features.items()
        }
    assert list(features) == list(taps)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
    ("strategy", "millions", "mapping"),
    [
        ("all", 7.6, {b: 38 - b for b in range(20, 38)}),
        ("bottleneck", 2.8, {21: 17, 24: 14, 27: 11, 30: 8, 33: 5, 36: 2}),
        ("windowed", 5.2, dict(zip(range(20, 25), range(18, 13, -1)))),
        ("multi-scale", 5.2, dict.fromkeys(range(20, 25), 14)),
    ],
)
def test_strategies_and_parameters_of_table_4(strategy, millions, mapping):
    feedback = Feedback(REAL, strategy)
    assert feedback.mapping == mapping
    convolutions = sum(layers[0].weight.numel() for layers in feedback.values())
    assert f"{convolutions / 1e6:.1f}" == str(millions)
    norms = 2 * sum(REAL.blocks[target].channels for target in mapping.values())
    assert sum(p.numel() for p in feedback.parameters()) == convolutions + norms
    assert {name.split(".")[0] for name in feedback.state_dict()} == set(map(str, mapping))


def test_strategies_follow_the_architecture():
    config = golden.CONFIGS["classic64"]  # 25 blocks, levels of 4
    assert feedback_map(config.blocks, "bottleneck") == {16: 10, 20: 6, 24: 2}
    assert feedback_map(config.blocks, "windowed") == {14: 12, 15: 11, 16: 10, 17: 9, 18: 8}
    assert feedback_map(config.blocks, "multi-scale") == dict.fromkeys(range(14, 19), 8)
    assert feedback_map(config.blocks, {"20": 3}) == {20: 3}  # JSON and YAML make strings of keys
    assert feedback_map(config.blocks, "20:3, 16:10") == {16: 10, 20: 3}
    with pytest.raises(ValueError, match="this network has 4"):
        feedback_map(UNetConfig(32, (1, 1), 1, (2,), num_head_channels=16).blocks, "windowed")


def two_full_passes(feedback, unet, x, t, taps):
    """DifFeed written out plainly: both passes run from the first block."""
    with torch.no_grad():
        sources = unet.forward_features(x, t, list(feedback.mapping))
    maps: dict[int, list] = {}
    for source, target in feedback.mapping.items():
        maps.setdefault(target, []).append(feedback[str(source)](sources[source]))
    return unet.forward_features(x, t, taps, inject=maps)


@pytest.mark.parametrize("mapping", ["bottleneck", {30: 4, 20: 12, 21: 12}, {19: 1}])
def test_shared_start_changes_neither_values_nor_gradients(mapping):
    taps, results = (2, 12, 24), []
    for run in (two_full_passes, lambda feedback, *args: feedback(*args)):
        unet = golden.fill(UNet(SMALL, 37)).train()
        feedback = golden.fill(Feedback(SMALL, mapping), "feedback.")
        features = run(feedback, unet, golden.image("narrow256"), golden.T, taps)
        sum(x.square().mean() for x in features.values()).backward()
        parameters = {**dict(unet.named_parameters()), **dict(feedback.named_parameters())}
        results.append((features, {name: p.grad for name, p in parameters.items()}))
    (plain, expected), (ours, gradients) = results
    for b in taps:
        assert (ours[b] - plain[b]).abs().max() < 5e-6 * plain[b].abs().max(), b
    present = {name: grad for name, grad in expected.items() if grad is not None}
    assert present.keys() == {name for name, grad in gradients.items() if grad is not None}
    # a bias before a norm with one channel in a group has no gradient but rounding
    rounding = 1e-6 * max(grad.abs().max().item() for grad in present.values())
    for name, grad in present.items():
        scale = max(grad.abs().max().item(), 1e-8)
        assert (grad - gradients[name]).abs().max() < 1e-4 * scale + rounding, name


def runs(feedback: Feedback, unet: UNet, taps) -> Counter:
    ran: Counter = Counter()
    hooks = [
        unet.module(b).register_forward_hook(lambda *_, b=b: ran.update([b])) for b in unet.blocks
    ]
    with torch.no_grad():
        feedback(unet, golden.image("narrow256"), 90, taps)
    for hook in hooks:
        hook.remove()
    return ran


def test_nothing_runs_more_often_than_needed(small):
    ran = runs(Feedback(SMALL, "windowed").eval(), small, (24,))
    assert ran == {**dict.fromkeys(range(1, 15), 1), **dict.fromkeys(range(15, 25), 2)}
    ran = runs(Feedback(SMALL, "bottleneck").eval(), small, (24,))
    expected = {1: 1, 2: 1, **dict.fromkeys(range(3, 25), 2), **dict.fromkeys(range(25, 37), 1)}
    assert ran == expected


def test_first_pass_has_a_gradient_only_when_asked(small):
    x = golden.image("narrow256")
    for asked in (False, True):
        feedback = golden.fill(Feedback(SMALL, {30: 14}, first_pass_grad=asked), "feedback.")
        small.zero_grad()
        feedback(small, x, 90, (24,))[24].sum().backward()
        assert (small.module(28)[0].in_layers[2].weight.grad is not None) == asked
        assert small.module(5)[0].in_layers[2].weight.grad is not None
    small.zero_grad()


@pytest.mark.parametrize(
    "kinds",
    [("conv", "group", "silu"), ("conv", "depthwise", "batch", "relu"), ("relu",)],
    ids="-".join,
)
def test_layers_are_applied_in_order(kinds, small):
    """Against functional calls; the source's own output stays as it is."""
    feedback = golden.fill(Feedback(SMALL, {24: 14}, layers=kinds), "feedback.")
    weights = feedback.state_dict()
    x = golden.image("narrow256")
    source = small.forward_features(x, golden.T, [24])[24].detach()
    y = source
    for i, kind in enumerate(kinds):
        w = {name.split(".")[2]: v for name, v in weights.items() if name.startswith(f"24.{i}.")}
        if kind in ("conv", "depthwise"):
            groups, padding = len(y[0]) // w["weight"].shape[1], w["weight"].shape[-1] // 2
            y = F.conv2d(y, w["weight"], padding=padding, groups=groups)
        elif kind == "batch":
            y = F.batch_norm(y, w["running_mean"], w["running_var"], w["weight"], w["bias"])
        elif kind == "group":
            y = F.group_norm(y, 32, w["weight"], w["bias"])
        else:
            y = F.relu(y) if kind == "relu" else F.silu(y)
    expected = small.forward_features(x, golden.T, [24], inject={14: y})[24]
    found = feedback(small, x, golden.T, [24], first_blocks=[24])
    torch.testing.assert_close(found[24], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[24, "first"], source, rtol=1e-5, atol=1e-5)


def test_taps_of_both_passes(small):
    """The first pass is a plain run without gradient, wherever the taps stand."""
    feedback = golden.fill(Feedback(SMALL, {30: 14, 24: 15}), "feedback.")
    x, early = golden.image("narrow256"), (36, 19, 14, 12)
    found = feedback(small, x, golden.T, (24, 14, 12), first_blocks=early)
    assert list(found) == [24, 14, 12, *((b, "first") for b in early)]
    plain = small.forward_features(x, golden.T, early)
    second = feedback(small, x, golden.T, (24, 14, 12))
    for b in early:
        torch.testing.assert_close(found[b, "first"], plain[b], rtol=1e-5, atol=1e-5)
        assert not found[b, "first"].requires_grad
    assert all(torch.equal(found[b], second[b]) for b in second)
    assert (found[14] - plain[14]).abs().max() > 0.01
    backbone = DiffusionBackbone(small, None, 90, (24,), {30: 14}, None, None)
    images = x.clamp(-1, 1)[:1]
    taps = backbone.eval().forward_taps(images, (90, 150), first_blocks=(19,))
    assert list(taps) == [(90, 24), (90, 19, "first"), (150, 24), (150, 19, "first")]


@pytest.mark.parametrize(
    ("strategy", "layers", "message"),
    [
        ({25: 13}, ("conv", "norm"), "unknown feedback layer 'norm'"),
        ("24:14,x:3", ("conv",), "feedback sources"),
        ("botleneck", ("conv",), "unknown feedback 'botleneck'; choose from all, bottleneck"),
        ({24: 19}, ("conv",), r"24 -> 19: the target must be an encoder block \(1 to 18\)"),
        ({5: 9}, ("conv",), "5 -> 9"),
    ],
)
def test_bad_feedback(strategy, layers, message):
    with pytest.raises(ValueError, match=message):
        Feedback(SMALL, strategy, layers=layers)


def test_feedback_that_reaches_no_tap_is_refused(small):
    with pytest.raises(ValueError, match=r"blocks \[14, 15, 16, 17, 18\] can't reach the taps"):
        Feedback(SMALL, "windowed")(small, golden.image("narrow256"), 90, (12,))


def test_training_on_an_image_with_one_position_at_the_deepest_stride():
    backbone = DiffusionBackbone("tiny", blocks=(24,), feedback="bottleneck", out_strides=(16,))
    maps = backbone.train()(torch.rand(1, 3, 32, 32))
    maps[0].sum().backward()
    gradients = [p.grad for p in backbone.feedback.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("memory", [{}, {"activation_budget": 5e-4}])
@pytest.mark.parametrize("strategy", ["bottleneck", "windowed"])
def test_fine_tuning_under_autocast_reaches_every_parameter(strategy, memory):
    """Before torch 2.11, autocast caches the first pass's casts, which carry no gradient."""
    backbone = golden.fill(DiffusionBackbone(SMALL, feedback=strategy, **memory)).train()
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))
    sum(x.float().square().mean() for x in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
