"""Hugging Face transformers: config, backbone, whole models, image processor."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from snippets import run_snippet

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from diffbackbone import DiffusionBackbone, UNetConfig  # noqa: E402
from diffbackbone.transformers import (  # noqa: E402
    DiffusionBackboneConfig,
    DiffusionBackboneModel,
    DiffusionImageProcessor,
)

WEIGHTS = "diffbackbone://tiny.safetensors"
ALL = [0, 1, 2, 3]


def make_config(**options):
    settings = {"unet": "tiny", "checkpoint": WEIGHTS, "out_channels": 32, "out_indices": ALL}
    return DiffusionBackboneConfig(**{**settings, **options})


def make_images(height=70, width=90):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make_upernet(backbone):
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=5, hidden_size=32, auxiliary_channels=16
    )
    return transformers.UperNetForSemanticSegmentation(config)


def make_mask2former(backbone):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=8,
        num_labels=5,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def loss_of(model, images):
    labels = torch.zeros(len(images), *images.shape[-2:], dtype=torch.long)
    labels[..., 20:, 30:] = 3
    if isinstance(model, transformers.UperNetForSemanticSegmentation):
        return model(images, labels=labels).loss
    masks = [torch.stack([label == 0, label == 3]).float() for label in labels]
    return model(images, mask_labels=masks, class_labels=[torch.tensor([0, 3])] * len(images)).loss


def logits_of(model, images):
    with torch.no_grad():
        output = model(images)
    return getattr(output, "logits", getattr(output, "masks_queries_logits", None))


class TestConfig:
    def test_stages_are_the_blocks_in_their_order(self):
        config = DiffusionBackboneConfig(blocks=(24, 12, 33), out_strides=None)
        assert config.stage_names == ["block24", "block12", "block33"]
        assert (config.out_features, config.out_indices) == (["block33"], [2])

    def test_errors(self):
        with pytest.raises(ValueError, match="must differ"):
            DiffusionBackboneConfig(blocks=[24, 24], out_strides=None)

    def test_an_unknown_argument_warns(self):
        with pytest.warns(UserWarning, match="does not know timestpe"):
            DiffusionBackboneConfig(timestpe=3)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"unet": UNetConfig.from_preset("tiny"), "feedback": {24: 14}, "blocks": 24},
            {"timestep": 75, "out_strides": None, "out_features": ["block27"], "num_labels": 7},
        ],
    )
    def test_a_saved_config_equals_the_loaded_one(self, tmp_path, options):
        config = DiffusionBackboneConfig(**options)
        config.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = transformers.AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is DiffusionBackboneConfig
        assert loaded.to_dict() == config.to_dict()

    def test_all_settings_are_written_and_the_checkpoint_is_not(self):
        content = json.loads(DiffusionBackboneConfig(checkpoint="/home/me/w.pt").to_json_string())
        assert content["combine"] == "concat"  # though it is the default, which may change
        assert content["blocks"] == [33, 30, 27, 24]
        assert "checkpoint" not in content
        assert "/home/me" not in json.dumps(content)


class TestBackbone:
    def test_maps_are_those_of_the_backbone(self):
        options = {"out_channels": None, "feedback": "windowed", "freeze": True}
        torch.manual_seed(0)
        expected = DiffusionBackbone("tiny", WEIGHTS, **options).eval()
        torch.manual_seed(0)
        model = transformers.AutoBackbone.from_config(make_config(**options)).eval()
        images = make_images()
        maps = expected(images)
        output = model(images)
        assert model.channels == list(expected.channels)
        assert all(map(torch.equal, output.feature_maps, maps))
        assert output.hidden_states is None

    def test_maps_follow_the_features_asked_for(self):
        images = make_images(64, 96)
        model = DiffusionBackboneModel(make_config(out_channels=None, out_indices=None)).eval()
        assert model.out_feature_channels == dict(
            zip(["block33", "block30", "block27", "block24"], model.num_features)
        )
        output = model(images, output_hidden_states=True)
        maps = output.hidden_states
        assert [tuple(x.shape[-2:]) for x in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
        assert [x.shape[1] for x in maps] == model.num_features
        assert len(output.feature_maps) == len(model.channels) == 1
        assert torch.equal(output.feature_maps[0], maps[3])
        model.out_features = ["block33", "block27"]
        assert model.channels == [model.num_features[0], model.num_features[2]]
        (chosen,) = model(images, return_dict=False)
        assert [torch.equal(x, maps[i]) for x, i in zip(chosen, (0, 2))] == [True, True]

    def test_class_labels(self):
        unet = {"preset": "tiny", "num_classes": 7}
        config = make_config(unet=unet, checkpoint=None, class_label=3)
        with pytest.warns(UserWarning, match="RANDOM"):
            model = transformers.AutoBackbone.from_config(config).eval()
        for parameter in model.parameters():  # fresh residual branches do nothing
            torch.nn.init.normal_(parameter, std=0.05)
        images = make_images()
        default = model(images).feature_maps[0]
        same, other = (
            model(images, class_labels=torch.tensor([label] * 2)).feature_maps[0]
            for label in (3, 1)
        )
        assert torch.equal(default, same)
        assert not torch.allclose(default, other)

    def test_weights_that_a_checkpoint_lacks_are_initialized(self, tmp_path):
        DiffusionBackboneModel(make_config()).save_pretrained(tmp_path)
        model = DiffusionBackboneModel.from_pretrained(
            tmp_path, out_channels=48, ignore_mismatched_sizes=True
        )
        assert model.channels == [48] * 4
        assert 0 < model.model.proj[0].weight.std() < 1
        expected = DiffusionBackbone("tiny", WEIGHTS).unet.state_dict()
        assert all(torch.equal(x, expected[k]) for k, x in model.model.unet.state_dict().items())


class TestWholeModels:
    @pytest.mark.parametrize(
        ("make", "options"),
        [(make_upernet, {}), (make_mask2former, {"freeze": True, "feedback": "windowed"})],
    )
    def test_trains_and_comes_back_to_the_bit(self, tmp_path, make, options):
        images = make_images(40, 50)
        model = make(make_config(**options)).train()
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loss_of(model, images).backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
        is_unet = {name for name, _ in model.named_parameters() if ".unet." in name}
        assert is_unet.isdisjoint(trained) == bool(options)
        optimizer.step()
        assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        saved = model.state_dict()
        assert saved.keys() == loaded.state_dict().keys()
        assert all(torch.equal(x, saved[name]) for name, x in loaded.state_dict().items())
        loaded = copy.deepcopy(loaded)  # mapped weights round otherwise: another alignment
        assert torch.equal(logits_of(loaded, images), logits_of(model.eval(), images))
        loaded.train()
        assert trained == {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert any(m.training for m in loaded.modules())
        unets = [m for name, m in loaded.named_modules() if name.endswith(".unet")]
        assert [unet.training for unet in unets] == [not options]


class TestFiles:
    def test_a_model_is_whole_without_its_checkpoint(self, tmp_path):
        """Loading reads no checkpoint, and gives frozen weights back, too."""
        checkpoint = tmp_path / "unet.pt"
        unet = DiffusionBackbone("tiny", WEIGHTS).unet
        torch.save(unet.state_dict(), checkpoint)
        model = make_upernet(make_config(checkpoint=str(checkpoint), freeze=True))
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        checkpoint.unlink()
        assert str(tmp_path) not in (folder / "config.json").read_text()
        loaded = type(model).from_pretrained(folder)
        again = tmp_path / "again"
        loaded.save_pretrained(again)
        assert str(tmp_path) not in (again / "config.json").read_text()
        expected = unet.state_dict()
        weights = loaded.backbone.model.unet.state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in weights.items())

    def test_half_precision(self, tmp_path):
        model = DiffusionBackboneModel(
            make_config(blocks=(5, 24), out_strides=None, out_indices=[1])
        ).eval()
        model.save_pretrained(tmp_path)
        half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        images = make_images(32, 32)
        (expected,), (ours,) = model(images).feature_maps, half(images.bfloat16()).feature_maps
        assert (ours - expected).abs().max() < 0.05 * expected.abs().max()


class TestImageProcessor:
    def test_pixels_come_out_in_the_backbones_range(self, tmp_path):
        DiffusionImageProcessor(size={"height": 48, "width": 64}).save_pretrained(tmp_path)
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        assert type(processor) is DiffusionImageProcessor
        image = np.zeros((30, 40, 3), np.uint8)
        image[:, 20:] = 255
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 48, 64)
        assert (pixels.min(), pixels.max()) == (-1, 1)


def test_documented_snippet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_snippet("huggingface.md", "In your own code")
    assert names["model"](**names["inputs"]).logits.shape == (2, 12, 96, 128)
