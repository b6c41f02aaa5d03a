"""guided-diffusion's classifiers: parity with the authors' values, taps, scores, checkpoints.

``data/reference_classifier.npz`` holds what guided-diffusion's own ``EncoderUNetModel`` gives for
weights and input by the golden rule; the table below holds facts about its released sizes.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import golden
import numpy as np
import pytest
import torch

from diffbackbone import CheckpointError, DiffusionBackbone, UNet, UNetConfig, load_checkpoint
from diffbackbone.models import build_network, resolve_network
from diffbackbone.models.classifier import CLASSIFIERS, ClassifierConfig, EncoderUNet

NARROW = ClassifierConfig(
    model_channels=32, num_head_channels=16, image_size=64, out_channels=10
)  # the blocks of the 256-px classifier at a quarter of its width
TINY = ClassifierConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_strides=(2,),
    num_head_channels=32,
    out_channels=5,
    image_size=32,
)
TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:.*weights are RANDOM")


@pytest.fixture(scope="module")
def narrow() -> EncoderUNet:
    return golden.fill(EncoderUNet(NARROW))


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "classifier.pt"
    torch.save(golden.fill(EncoderUNet(TINY)).state_dict(), path)
    return path


def images(size: int = 32) -> torch.Tensor:
    return golden.image("classifier")[..., :size, :size].clamp(-1, 1)


def vars_of(config: ClassifierConfig, **changes) -> dict:
    return {**dataclasses.asdict(config), **changes}


def test_taps_and_scores_equal_the_authors_code(narrow):
    with np.load(Path(golden.FILE).with_name("reference_classifier.npz")) as data:
        reference = dict(data)
    with torch.no_grad():
        taps = narrow.forward_features(golden.image("classifier"), golden.T, (1, 4, 12, 19))
        scores = narrow(golden.image("classifier"), golden.T)
    errors = {b: golden.relative_error(x, reference, f"b{b}") for b, x in taps.items()}
    assert max(errors.values()) < TOLERANCE, errors
    expected = torch.from_numpy(reference["scores"])
    assert scores.shape == expected.shape == (2, 10)
    assert (scores - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "names", "blocks", "size", "schedule"),
    [
        ("gd64_classifier", 0x46B0D270, 21, 64, "cosine"),
        ("gd128_classifier", 0x30F3D0FF, 16, 128, "linear"),
        ("gd256_classifier", 0xAAFBE12A, 19, 256, "linear"),
        ("gd512_classifier", 0xDFEB2CB5, 22, 512, "linear"),
    ],
)
def test_released_sizes(name, names, blocks, size, schedule):
    config = resolve_network(name)
    with torch.device("meta"):
        model = build_network(config)
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items())
    assert zlib.crc32("\n".join(lines).encode()) == names
    assert len(model.blocks) == blocks
    assert (config.image_size, config.noise_schedule) == (size, schedule)
    assert config.blocks[blocks].stride == size // 8
    with torch.device("meta"):
        assert model(torch.empty(2, 3, size, size), 0).shape == (2, 1000)


def test_presets_are_the_published_flags():
    for config in CLASSIFIERS.values():
        assert config.attention_strides == tuple(config.image_size // side for side in (32, 16, 8))
        assert (config.model_channels, config.num_head_channels) == (128, 64)
        assert not config.use_new_attention_order


def test_blocks_have_their_numbers_in_the_unet(narrow):
    whole = UNetConfig(model_channels=32, num_head_channels=16).blocks
    assert {b: whole[b] for b in range(1, 20)} == narrow.blocks
    state = narrow.start(images(64), 0, 19)
    narrow.traverse(state, 19)
    assert not state.skips  # which no decoder would read


@pytest.mark.parametrize("built", [True, False])
def test_backbone_takes_a_classifier(built, file):
    backbone = DiffusionBackbone(
        EncoderUNet(TINY) if built else {"preset": "gd256_classifier", **vars_of(TINY)},
        file,
        timestep=0,
        blocks=(4, 2),
        out_channels=8,
        out_strides=(4, 2),
        noise="none",
    ).train()
    assert isinstance(backbone.unet, EncoderUNet)
    maps = backbone(images().requires_grad_())
    assert [tuple(x.shape) for x in maps] == [(2, 8, 8, 8), (2, 8, 16, 16)]
    sum(x.square().mean() for x in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


def test_feedback_is_refused():
    with pytest.raises(ValueError, match="no decoder"):
        DiffusionBackbone(TINY, blocks=(5,), feedback={4: 2}, out_strides=None)


def test_scores_need_the_classifiers_size_and_all_blocks():
    with pytest.raises(ValueError, match="32 x 32"):
        EncoderUNet(TINY)(golden.image("classifier"), 0)
    with pytest.raises(ValueError, match="ends at 3"):
        EncoderUNet(TINY, last_block=3)(images(), 0)


def test_every_key_of_a_checkpoint_is_accounted_for(file):
    whole, part = EncoderUNet(TINY), EncoderUNet(TINY, last_block=3)
    report = load_checkpoint(whole, file)
    assert not report.unused
    assert not report.foreign
    assert torch.equal(whole(images(), 5), golden.fill(EncoderUNet(TINY))(images(), 5))
    report = load_checkpoint(part, file)
    assert set(report.loaded) == set(part.state_dict())
    assert set(report.unused) == set(whole.state_dict()) - set(part.state_dict())


def test_weights_of_a_diffusion_model_are_refused(file):
    torch.save(UNet(UNetConfig(**vars_of(TINY, out_channels=6))).state_dict(), file)
    with pytest.raises(CheckpointError, match="missing: out.2.positional_embedding"):
        load_checkpoint(EncoderUNet(TINY), file)
    part = EncoderUNet(TINY, last_block=3)
    with pytest.raises(CheckpointError, match="unexpected: output_blocks"):
        load_checkpoint(part, file)


@pytest.mark.parametrize("field", [{"num_classes": 10}, {"num_head_channels": None}, {"depth": 2}])
def test_fields_that_no_classifier_has_are_refused(field):
    with pytest.raises((ValueError, TypeError)):
        resolve_network({"preset": "gd256_classifier", **field})
