"""Networks of diffusers: the same features as its own modules compute, and all of the backbone."""

from __future__ import annotations

import importlib
import json
import shutil

import golden
import pytest
import safetensors.torch
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from diffbackbone import DiffusionBackbone  # noqa: E402
from diffbackbone.optim import layer_scales  # noqa: E402
from diffbackbone.padding import pad_to_multiple  # noqa: E402
from diffbackbone.utils import MissingPackageError  # noqa: E402

T = 90


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
    try:
        net.eval()(*args, **kwargs)
    except RuntimeError:  # DiT's output layer takes squares only, after all blocks have run
        assert hasattr(net, "transformer_blocks")
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


CROSS = {"sample_size": 16, "norm_num_groups": 8, "cross_attention_dim": 24}
SD_UNETS = {
    "sd15": {
        "block_out_channels": (16, 32, 32, 32),
        "attention_head_dim": 4,
        "layers_per_block": 2,
    },
    "sd2": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "layers_per_block": (1, 2),
        "time_cond_proj_dim": 8,
        "upcast_attention": True,
    },
    "sdxl": {
        "block_out_channels": (16, 32, 48),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 6),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "cross_attention_dim": 48,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    "simple": {
        "block_out_channels": (16, 32),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "encoder_hid_dim": 24,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "num_class_embeds": 7,
        "class_embeddings_concat": False,
        "attention_head_dim": 8,
    },
}


def tiny_vae():
    return golden.fill(
        diffusers.AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.2,
        )
    )


def tiny_text_encoder(with_projection: bool = False):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=4, hidden_size=24, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, projection_dim=24, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    kind = "CLIPTextModelWithProjection" if with_projection else "CLIPTextModel"
    torch.manual_seed(0)
    encoder = getattr(transformers, kind)(config)
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}
    return encoder, transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that diffusers has written, by name."""
    root = tmp_path_factory.mktemp("diffusers")
    for name, config in UNETS.items():
        net = golden.fill(diffusers.UNet2DModel(**SMALL, **config))
        diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(root / name)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        prediction_type="v_prediction",
    )  # fmt: skip
    for name, config in SD_UNETS.items():
        net = golden.fill(diffusers.UNet2DConditionModel(**{**CROSS, **config}))
        encoder, tokenizer = tiny_text_encoder()
        parts = {"vae": tiny_vae(), "unet": net, "scheduler": scheduler}
        parts |= {"text_encoder": encoder, "tokenizer": tokenizer}
        if name == "sdxl":
            second, _ = tiny_text_encoder(with_projection=True)
            pipeline = diffusers.StableDiffusionXLPipeline(
                **parts, text_encoder_2=second, tokenizer_2=tokenizer
            )
        else:
            pipeline = diffusers.StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        pipeline.save_pretrained(root / name)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=4, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    golden.fill(net)
    diffusers.DiTPipeline(net, tiny_vae(), diffusers.DDIMScheduler()).save_pretrained(root / "dit")
    return root


def build(folder, **kwargs) -> DiffusionBackbone:
    """Build a frozen backbone of raw taps, without noise."""
    options = {"out_channels": None, "out_strides": None, "freeze": True, "noise": "none", **kwargs}
    return DiffusionBackbone(options.pop("unet", f"diffusers://{folder}"), timestep=T, **options)


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


@pytest.mark.parametrize("name", SD_UNETS)
def test_taps_of_stable_diffusion_equal_diffusers_own(folders, name):
    sdxl = name == "sdxl"
    kind = diffusers.StableDiffusionXLPipeline if sdxl else diffusers.StableDiffusionPipeline
    pipeline = kind.from_pretrained(folders / name, safety_checker=None)
    embeds = pipeline.encode_prompt(
        "", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    net = pipeline.unet
    blocks = range(1, len(ends_of_blocks(net)) + 1)
    backbone = build(folders / name, blocks=blocks).eval()
    images = torch.rand(2, 3, 150, 200) * 2 - 1
    padded = pad_to_multiple(images, backbone.size_divisibility)
    with torch.no_grad():
        latents = pipeline.vae.encode(padded).latent_dist.mean * pipeline.vae.config.scaling_factor
    x_t = backbone.schedule.add_noise(latents, T, None)
    extra = {}
    if sdxl:
        ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).expand(2, -1)
        extra["added_cond_kwargs"] = {"text_embeds": embeds[2].expand(2, -1), "time_ids": ids}
    labels = torch.tensor([2, 6]) if name == "simple" else None
    expected = watch(
        net, x_t, T, encoder_hidden_states=embeds[0].expand(2, -1, -1), class_labels=labels, **extra
    )
    ours = backbone.forward_taps(images, y=labels)
    for b in blocks:
        height, width = (-(-side // backbone.unet.blocks[b].stride) for side in (150, 200))
        assert_close({b: ours[T, b]}, {b: expected[b][..., :height, :width]})


def test_stable_diffusion_has_25_blocks(folders):
    backbone = build(folders / "sd15", blocks=(12, 13, 19, 25))
    assert len(backbone.unet.blocks) == 25
    assert backbone.strides == (64, 64, 16, 8)
    scheduler = diffusers.DDIMScheduler.from_pretrained(folders / "sd15" / "scheduler")
    torch.testing.assert_close(
        backbone.schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6
    )
    assert backbone.unet.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("size", [(64, 64), (70, 110)])
@pytest.mark.parametrize("label", [None, 3])
def test_raw_taps_of_dit_equal_diffusers_own(folders, size, label):
    pipeline = diffusers.DiTPipeline.from_pretrained(folders / "dit")
    backbone = build(
        folders / "dit", blocks=(1, 2, 3, 4), class_label=label,
        unet={"preset": f"diffusers://{folders / 'dit'}", "taps": "raw"},
    )  # fmt: skip
    images = torch.rand(2, 3, *size) * 2 - 1
    padded = pad_to_multiple(images, 16)
    with torch.no_grad():
        latents = pipeline.vae.encode(padded).latent_dist.mean * pipeline.vae.config.scaling_factor
    x_t = backbone.schedule.add_noise(latents, T, None)
    y = torch.full((2,), 10 if label is None else label)
    height, width = (side // 16 for side in padded.shape[-2:])
    expected = watch(pipeline.transformer, x_t, torch.tensor([T, T]), class_labels=y)
    ours = backbone(images)
    for b, x in zip(backbone.blocks, ours):
        own = expected[b].transpose(1, 2).unflatten(2, (height, width))
        assert_close({b: x}, {b: own})


def test_taps_of_dit_are_normalized_by_the_blocks_own_modulation(folders):
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    (ours,) = build(folders / "dit", blocks=3)(images)
    raw = build(None, blocks=3, unet={"preset": f"diffusers://{folders / 'dit'}", "taps": "raw"})
    norm = raw.unet.net.transformer_blocks[2].norm1
    with torch.no_grad():
        tokens = raw(images)[0].permute(0, 2, 3, 1)
        emb = norm.emb(torch.tensor([T]), torch.tensor([10]), torch.float32)
        shift, scale = norm.linear(nn.functional.silu(emb)).chunk(6, dim=1)[:2]
        own = nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(ours.permute(0, 2, 3, 1), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "last"), [("sd15", 19), ("adm", 4), ("dit", 2)])
def test_blocks_after_the_last_tap_are_neither_kept_nor_run(folders, name, last):
    backbone = build(folders / name, blocks=last)
    whole = build(folders / name, blocks=len(backbone.unet.blocks))
    assert backbone.unet.last_block == last
    names = [name for name, _ in backbone.unet.net.named_parameters()]
    later = [whole.unet.blocks[b].name for b in range(last + 1, len(whole.unet.blocks) + 1)]
    removed = (*(f"{name}." for name in later), "conv_out", "proj_out")
    assert not any(name.startswith(removed) for name in names)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    (x,) = backbone(images)
    assert torch.equal(x, whole.forward_taps(images, blocks=[last])[T, last])
    with pytest.raises(ValueError, match="is not built"):
        backbone.forward_taps(images, blocks=[last + 1])


@pytest.mark.parametrize(
    ("name", "feedback", "blocks", "freeze"),
    [
        ("sd15", "bottleneck", (19, 16), True),
        ("sd15", {17: 3, 14: 9}, (16, 20), False),
        ("adm", "multi-scale", (24,), False),
        ("no_middle", "bottleneck", (7,), False),
        ("dit", {3: 1, 4: 2}, (4, 2), False),
    ],
)
def test_feedback_trains(folders, name, feedback, blocks, freeze):
    backbone = build(
        folders / name, blocks=blocks, feedback=feedback, out_channels=4, freeze=freeze
    ).train()
    maps = backbone(torch.rand(2, 3, 70, 64) * 2 - 1)
    sum(x.square().mean() for x in maps).backward()
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    without = {n for n, p in backbone.named_parameters() if p.grad is None}
    assert not trained & without
    assert any(n.startswith("unet.net.") for n in trained) != freeze
    assert not any(n.startswith("unet.vae.") for n in trained)


@pytest.mark.parametrize("freeze", [True, False])
def test_learned_condition_starts_from_the_empty_prompt_and_is_trained(folders, freeze, tmp_path):
    unet = {"preset": f"diffusers://{folders / 'sd15'}", "condition": "learned"}
    backbone = build(None, unet=unet, blocks=16, freeze=freeze, save_frozen=False).train()
    scales = layer_scales(backbone, 0.5)
    assert id(backbone.unet.tokens) not in scales
    assert scales[id(backbone.unet.net.conv_in.weight)] == 0.5**16
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    null = build(folders / "sd15", blocks=16)
    torch.testing.assert_close(backbone(images)[0], null(images)[0])
    backbone(images)[0].square().mean().backward()
    tokens = backbone.unet.tokens
    assert tokens.grad.abs().sum() > 0
    tokens.data += 1
    saved = backbone.state_dict()
    assert ("unet.net.conv_in.weight" in saved) != freeze  # left out: still the folder's
    again = build(None, unet=unet, blocks=16, freeze=freeze, save_frozen=False)
    again.load_state_dict(saved)
    torch.testing.assert_close(again(images)[0], backbone(images)[0])


def test_condition_of_a_file(folders, tmp_path):
    path = tmp_path / "condition.safetensors"
    tokens, pooled = torch.randn(1, 5, 48), torch.randn(1, 24)
    safetensors.torch.save_file({"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}, path)
    unet = {"preset": f"diffusers://{folders / 'sdxl'}", "condition": str(path)}
    backbone = build(None, unet=unet, blocks=9)
    assert torch.equal(backbone.unet.tokens, tokens)
    assert torch.equal(backbone.unet.pooled, pooled)
    for wrong in ({"pooled_prompt_embeds": pooled[:, 1:]}, {"prompt_embeds": tokens[..., 1:]}):
        found = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled, **wrong}
        safetensors.torch.save_file({n: x.clone() for n, x in found.items()}, path)
        with pytest.raises(ValueError, match=r"prompt_embeds \(1, L, 48\) and pooled_.* \(1, 24\)"):
            build(None, unet=unet, blocks=9)
    path.unlink()
    with pytest.raises(ValueError, match="prompt_embeds"):
        build(None, unet=unet, blocks=9)
    null = build(folders / "sdxl", blocks=9)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    assert not torch.allclose(backbone(images)[0], null(images)[0])


def test_weights_of_a_file_replace_the_folders(folders, tmp_path):
    """CleanDIFT's files hold a whole U-Net under diffusers' names."""
    net = diffusers.UNet2DConditionModel.from_pretrained(folders / "sd15" / "unet")
    weights = {name: x * 1.1 for name, x in net.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "clean.safetensors")
    backbone = build(folders / "sd15", blocks=16, checkpoint=tmp_path / "clean.safetensors")
    own = backbone.unet.net.state_dict()
    assert len(own) < len(weights)
    assert all(torch.equal(x, weights[name]) for name, x in own.items())
    torch.save(
        {"state_dict": {f"backbone.unet.net.{n}": x for n, x in own.items()}}, tmp_path / "m.pth"
    )
    report = backbone.load(tmp_path / "m.pth")
    loaded = [name for name in report.loaded if name.startswith("net.")]
    assert (report.prefix, len(loaded)) == ("backbone.unet.net.", len(own))
    del weights["conv_in.bias"]
    weights["other"] = torch.zeros(1)
    safetensors.torch.save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"missing: net\.conv_in\.bias\n  unexpected: net\.other"):
        backbone.load(tmp_path / "broken.safetensors")


def test_budget_recomputes_blocks_and_gradients_stay(folders):
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    grads, counts = [], []
    for budget in (None, 0.0005, 0.0):
        backbone = build(
            folders / "sd15", blocks=25, freeze=False, noise="fixed", activation_budget=budget
        )
        state = backbone.unet.start(torch.randn(1, 4, 8, 8), T, 25)
        counts.append(len(state.recompute))
        backbone(images)[0].square().mean().backward()
        grads.append(backbone.unet.net.conv_in.weight.grad)
    assert counts[0] == 0 < counts[1] < counts[2] == 25
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


@pytest.mark.parametrize(("name", "dtype"), [("dit", "bfloat16"), ("sdxl", "float16")])
def test_half_precision_is_close(folders, name, dtype):
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    (expected,) = build(folders / name, blocks=4)(images)
    backbone = build(folders / name, blocks=4, dtype=dtype)
    assert backbone.unet.weights_dtype == getattr(torch, dtype)
    (x,) = backbone(images)
    assert x.dtype == torch.float32
    assert (x - expected).norm() < 0.05 * expected.norm()
    if dtype == "float16":
        assert next(backbone.unet.vae.parameters()).dtype == torch.float32


def test_what_is_refused(folders, tmp_path):
    skips = {"down_block_types": ["SkipDownBlock2D"], "up_block_types": ["SkipUpBlock2D"]}
    for message, config in {
        "FluxTransformer2DModel, which is not": {"_class_name": "FluxTransformer2DModel"},
        "SkipDownBlock2D.* are not": {"_class_name": "UNet2DModel", **skips},
        "dual_cross": {"_class_name": "UNet2DConditionModel", "dual_cross_attention": True},
    }.items():
        config["block_out_channels"] = [32] * len(config.get("down_block_types", range(4)))
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            build(tmp_path, blocks=1)
    with pytest.raises(ValueError, match="no CLIP text encoder"):
        build(own_folder(folders, tmp_path), blocks=1)
    unet = {"preset": f"diffusers://{own_folder(folders, tmp_path)}", "condition": "learned"}
    with pytest.raises(ValueError, match="\\(N, 4, H, W\\)"):
        build(None, unet=unet, blocks=1)(torch.zeros(1, 3, 64, 64))
    with pytest.raises(FileNotFoundError, match="no folder"):
        build("/nowhere/at/all", blocks=1)
    with pytest.raises(ValueError, match="unet has no 'conditions'"):
        build(None, unet={"preset": f"diffusers://{folders}", "conditions": "null"})
    unet = {"preset": f"diffusers://{folders / 'ddpm'}", "condition": "learned"}
    with pytest.raises(ValueError, match="no cross-attention"):
        build(None, unet=unet, blocks=1)
    with pytest.raises(ValueError, match="1-based: transformer 1-4"):
        build(folders / "dit", blocks=5)
    with pytest.raises(ValueError, match="give a map"):
        build(folders / "dit", blocks=4, feedback="windowed")
    with pytest.raises(ValueError, match="integers from 0 to 9"):
        build(folders / "adm", blocks=4)(torch.zeros(1, 3, 64, 64), y=torch.tensor([10]))


def own_folder(folders, tmp_path):
    """Copy the U-Net of a pipeline away from its pipeline."""
    return shutil.copytree(folders / "sd15" / "unet", tmp_path / "own", dirs_exist_ok=True)


def test_a_models_own_folder(folders, tmp_path):
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    expected = build(folders / "sd15", blocks=16)(images)[0]
    assert torch.equal(build(folders / "sd15" / "unet", blocks=16)(images)[0], expected)
    unet = {
        "preset": f"diffusers://{own_folder(folders, tmp_path)}",
        "vae": str(folders / "sd15" / "vae"),
        "condition": "learned",
    }
    backbone = build(None, unet=unet, blocks=16)  # Stable Diffusion's schedule and random tokens
    backbone.unet.tokens.data = build(folders / "sd15", blocks=16).unet.tokens
    assert torch.equal(backbone(images)[0], expected)


def test_weights_that_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "ddpm" / "unet", tmp_path / "unet")
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    for name, value in {
        "conv_in.bias": torch.full((16,), torch.nan),
        "other": torch.ones(1),
    }.items():
        safetensors.torch.save_file({**weights, name: value}, file)
        with pytest.raises(ValueError, match=f"don't fit: .*{name}"):
            build(folder, blocks=3)
    torch.save(weights, file.with_suffix(".bin"))  # pickles are not read
    file.unlink()
    with pytest.raises(ValueError, match="can't be read"):
        build(folder, blocks=3)


def test_the_package_is_an_extra(monkeypatch):
    import diffbackbone.models.diffusers as family

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"diffbackbone\[diffusers\]"):
        importlib.reload(family)


def test_costs_of_stable_diffusion(folders):
    from diffbackbone.costs import block_costs
    from diffbackbone.models import resolve_network

    config = resolve_network(f"diffusers://{folders / 'sd15'}")
    costs = block_costs(config, 64, 64, last_block=5)
    backbone = build(folders / "sd15", blocks=5)
    assert costs[-1].total_parameters == sum(p.numel() for p in backbone.unet.parameters())
    assert costs[-1].flops > costs[0].flops > 0
    assert config.image_size == 128


def test_detectron2_configs_take_diffusers_models(folders):
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec

    from diffbackbone.detectron2 import add_diffusion_config
    from diffbackbone.detectron2.config import PIXEL_MEAN, PIXEL_STD, build_diffusion_backbone

    cfg = get_cfg()
    add_diffusion_config(cfg)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = PIXEL_MEAN, PIXEL_STD, "RGB"
    cfg.MODEL.DIFFUSION.UNET = f"diffusers://{folders / 'sd15'}"
    cfg.MODEL.DIFFUSION.UNET_OPTIONS.condition = "learned"
    cfg.MODEL.DIFFUSION.BLOCKS = (19,)
    backbone = build_diffusion_backbone(cfg, ShapeSpec(channels=3)).eval()
    assert backbone.unet.learned == ("tokens",)
    assert backbone(torch.zeros(1, 3, 128, 160))["b19"].shape == (1, 32, 8, 10)


def test_openmmlab_configs_take_diffusers_models(folders, recwarn):
    mmengine = pytest.importorskip("mmengine")
    from diffbackbone.openmmlab import backbone as _  # noqa: F401

    unet = {"preset": f"diffusers://{folders / 'dit'}", "taps": "raw"}
    options = {"blocks": [2, 4], "out_channels": 8, "out_strides": [8, 16]}
    cfg = mmengine.Config({"type": "DiffusionBackbone", "unet": unet, **options})
    backbone = mmengine.MODELS.build(cfg)
    weight = backbone.unet.net.pos_embed.proj.weight.clone()
    backbone.init_weights()
    assert torch.equal(backbone.unet.net.pos_embed.proj.weight, weight)
    assert backbone.unet.raw


@pytest.mark.parametrize("shift", [{}, {"shift_factor": 0.3}])
def test_latents_are_standardized_as_the_autoencoder_asks(folders, shift):
    unet = build(folders / "sd15", blocks=1).unet
    vae, images = unet.vae, torch.rand(1, 3, 64, 64, generator=torch.manual_seed(0)) * 2 - 1
    with torch.no_grad():
        plain = vae.encode(images).latent_dist.mean
        mean, std = [0.1, -0.2, 0.3, 0.4], [1.5, 2.0, 0.5, 0.7]
        options = shift or {"latents_mean": mean, "latents_std": std}
        vae.register_to_config(scaling_factor=0.2, **options)
        found = unet.encode(images)
    if shift:
        expected = (plain - 0.3) * 0.2
    else:
        mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
        expected = (plain - mean) / std * 0.2
    torch.testing.assert_close(found, expected)


def cache(root, name, folder, files, absent=()):
    """Put files of a folder into the hub's cache as a repository, with files known to be absent."""
    place = root / "hub" / f"models--{name.replace('/', '--')}"
    for part, names in (("snapshots", files), (".no_exist", absent)):
        for file in names:
            path = place / part / ("0" * 40) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((folder / file).read_bytes() if names is files else b"")
    (place / "refs").mkdir()
    (place / "refs/main").write_text("0" * 40)


def test_ids_on_the_hub(folders, tmp_path, monkeypatch):
    """From the hub's cache, offline, with those files alone that reading weights only asks for."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    weights = "diffusion_pytorch_model.safetensors"
    files = ["model_index.json", "scheduler/scheduler_config.json"]
    files += ["unet/config.json", f"unet/{weights}"]
    cache(tmp_path, "someone/pipeline", folders / "ddpm", files)
    own, unet = ["config.json", weights], folders / "ddpm/unet"
    cache(tmp_path, "someone/unet", unet, own, ["scheduler_config.json"])
    images = torch.zeros(1, 3, 32, 32)
    (expected,) = build(folders / "ddpm", blocks=3)(images)
    for name in ("someone/pipeline", "someone/pipeline/unet", "someone/unet"):
        assert torch.equal(build(name, blocks=3)(images)[0], expected)
    with pytest.raises(ValueError, match="someone/else"):
        build("someone/else", blocks=1)
    cache(tmp_path, "someone/unknown", unet, own)  # there may be a scheduler, which isn't cached
    with pytest.raises(ValueError, match="scheduler"):
        build("someone/unknown", blocks=1)
