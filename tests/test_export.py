"""The export command and `torch.export` of a backbone: what is written, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import golden
import numpy as np
import pytest
import torch

from diffbackbone import DiffusionBackbone, UNet, UNetConfig, export, load_checkpoint
from diffbackbone.checkpoint import read_unet_config
from diffbackbone.saving import save_safetensors
from diffbackbone.utils import UserError

SMALL = UNetConfig(32, (1, 1), 1, (2,), num_head_channels=16, image_size=48)
FIELDS = json.dumps(dataclasses.asdict(SMALL))
BLOCKS = ["--blocks", "6", "4"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weights are RANDOM"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # torch's own reader
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A U-Net as tools/pretrain.py writes it."""
    path = tmp_path_factory.mktemp("weights") / "unet.safetensors"
    save_safetensors(path, golden.fill(UNet(SMALL)).state_dict(), SMALL)
    return path


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """A trained DifFeed backbone, and training checkpoints with and without its frozen U-Net."""
    folder = tmp_path_factory.mktemp("trained")
    backbones = {}
    for name, save_frozen in (("whole", True), ("digest", False)):
        backbones[name] = backbone = DiffusionBackbone(
            SMALL, checkpoint=weights, blocks=(6, 4), out_strides=(2, 4), out_channels=8,
            feedback="bottleneck", freeze=True, save_frozen=save_frozen,
        ).eval()  # fmt: skip
        with torch.no_grad():
            for part in (backbone.proj, backbone.feedback):
                golden.fill(part)
        model = torch.nn.ModuleDict({"backbone": backbone, "head": torch.nn.Conv2d(8, 2, 1)})
        content = {"meta": {"seed": np.int64(1)}, "state_dict": model.state_dict()}
        torch.save(content, folder / f"{name}.pth")
    return backbones["whole"], folder


needs_export = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="torch.export needs torch 2.7"
)


def run(*arguments) -> None:
    export.main([str(argument) for argument in arguments])


def refusal(*arguments) -> str:
    printed = io.StringIO()
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(printed):
        run(*arguments)
    return f"{printed.getvalue()}{caught.value}"


def images(height=48, width=48, n=1, seed=5) -> torch.Tensor:
    return export.random_images((n, 3, height, width), seed)


def difference(ours, expected) -> float:
    assert [x.shape for x in ours] == [x.shape for x in expected]
    assert [x.dtype for x in ours] == [x.dtype for x in expected]
    return max(float((x - y).norm() / y.norm()) for x, y in zip(ours, expected))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def build(**kwargs) -> DiffusionBackbone:
    settings = {"blocks": (6, 4), "out_strides": (2, 4), "freeze": True, "out_channels": 8}
    settings = {"unet": SMALL, **settings, **kwargs}
    return golden.fill(DiffusionBackbone(**settings)).eval()


@needs_export
def test_a_fine_tuned_backbone_with_labels():
    settings = {"class_label": 3, "freeze": False, "activation_checkpointing": True}
    backbone, x = build(unet=SMALL.replace(num_classes=5), **settings), images(50, 70, 2)
    program = torch.export.export(backbone, (x,)).module()
    with torch.no_grad():
        assert difference(program(x), backbone(x)) < 1e-5
    # a program doesn't look at values, and takes no other size
    assert all(maps.isfinite().all() for maps in program(255 * x))
    with pytest.raises(Exception, match=r"size\(\)|shape"):
        program(images(50, 102, 2))


@needs_export
@pytest.mark.filterwarnings("error:.*assigned during export")  # tracing must keep nothing
def test_kept_noise_becomes_a_constant():
    """Fixed noise is a hash of coordinates, whose operations few runtimes for inference have."""

    def hashes(program) -> bool:
        return any("__xor__" in str(node.target) for node in program.graph.nodes)

    backbone = build(blocks=(4,), out_strides=(4,))
    with torch.no_grad():
        backbone(images())  # keeps the noise of this size
    for height, seed, constant in ((48, 0, True), (96, 0, False), (48, 1, False)):
        backbone.seed = seed
        x = images(height)
        program = torch.export.export(backbone, (x,))
        assert hashes(program) != constant
        with torch.no_grad():
            expected = build(blocks=(4,), out_strides=(4,), seed=seed)(x)
            assert difference(program.module()(x), expected) < 1e-5
            assert difference(backbone(x), expected) < 1e-5


@needs_export
def test_pt2_of_a_u_net_gives_the_plain_taps(weights, tmp_path, capsys):
    out = tmp_path / "deep" / "taps.pt2"
    run("--format", "pt2", "--checkpoint", weights, *BLOCKS, "--timestep", 50, "--out", out)
    backbone = DiffusionBackbone(
        SMALL, weights, 50, (6, 4), out_channels=None, out_strides=None, freeze=True
    ).eval()
    with torch.no_grad():
        ours = torch.export.load(out).module()(images())
        assert difference(ours, backbone(images())) < 1e-5
    said = capsys.readouterr().out
    assert "tensors loaded" in said
    assert "(1, 3, 48, 48)" in said  # the size it was trained at
    assert "map1: block 4, stride 2, (1, 32, 24, 24)" in said
    assert float(said.partition("largest relative difference ")[2].split()[0]) < 1e-5
    assert leftovers(out.parent) == ["taps.pt2"]


@pytest.mark.parametrize("name", ["whole", "digest"])
def test_a_trained_backbone_has_its_layers(weights, trained, tmp_path, name):
    backbone, folder = trained
    files = [str(folder / f"{name}.pth")]
    if name == "digest":  # the U-Net lies elsewhere, and the layers' file has its digest
        files = [str(weights), *files]
    options = export.ExportConfig(
        "pt2", tmp_path / "a.pt2", files[0], layers=files[-1], unet=FIELDS, blocks=(6, 4),
        feedback="bottleneck", out_strides=(2, 4),
    )  # fmt: skip
    x = images(50, 70, 2)
    with torch.no_grad():
        ours = export.build_backbone(options, export.read_config(options))(x)
        assert all(torch.equal(x, y) for x, y in zip(ours, backbone(x)))
    assert not [name for name in export.read_layers(options) if "unet." in name]
    options.feedback = "none"
    assert not [name for name in export.read_layers(options) if "feedback" in name]


@needs_export
@pytest.mark.parametrize("one_file", [True, False])
def test_onnx_runs_in_onnxruntime(weights, trained, tmp_path, monkeypatch, one_file):
    onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    pytest.importorskip("onnxscript")
    out = tmp_path / "backbone.onnx"
    if one_file:
        backbone, folder = trained
        run(
            "--format", "onnx", "--checkpoint", folder / "whole.pth", "--unet", FIELDS, *BLOCKS,
            "--feedback", "bottleneck", "--out-strides", 2, 4, "--size", 50, 70, "--out", out,
        )  # fmt: skip
        assert leftovers(tmp_path) == ["backbone.onnx"]
    else:
        kwargs = {"blocks": (2,), "out_channels": None, "out_strides": None, "freeze": True}
        backbone = DiffusionBackbone(SMALL, weights, **kwargs).eval()
        monkeypatch.setattr(export, "ONE_FILE", 0)  # as if it were too large for one file
        arguments = ["--checkpoint", weights, "--blocks", 2, "--size", 50, 70, "--out", out]
        run("--format", "onnx", *arguments)
        assert leftovers(tmp_path) == ["backbone.onnx", "backbone.onnx.data"]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    outputs = [y.name for y in session.get_outputs()]
    assert outputs == [f"map{i}" for i in range(len(backbone.blocks))]
    x = images(50, 70)
    with torch.no_grad():
        ours = [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]
        assert difference(ours, backbone(x)) < 1e-4
    nodes = {node.op_type for node in onnx.load(out, load_external_data=False).graph.node}
    assert "Conv" in nodes
    assert not nodes & {"BitShift", "BitwiseXor", "BitwiseAnd"}  # the noise is a constant


@needs_export
def test_a_program_that_computes_something_else_is_not_kept(weights, tmp_path, monkeypatch):
    out = tmp_path / "wrong.pt2"
    out.write_text("what was there before")

    class Wrong:
        def module(self):
            return lambda x: [torch.zeros(1, 32, 24, 24)] * 2

    monkeypatch.setattr(torch.export, "export", lambda *_: None)
    monkeypatch.setattr(torch.export, "save", lambda _, path: path.write_text("wrong"))
    monkeypatch.setattr(torch.export, "load", lambda _: Wrong())
    said = refusal("--format", "pt2", "--checkpoint", weights, *BLOCKS, "--out", out)
    assert "differs" in said
    assert out.read_text() == "what was there before"
    assert leftovers(tmp_path) == ["wrong.pt2"]


def test_shapes_and_nan_count_as_a_difference():
    x = torch.ones(2)
    export.verify([x], [x], 0)
    for other in ([x, x * torch.nan], [x[:1], x], [x], [x, x + 1e-3]):
        with pytest.raises(UserError, match="nothing was kept"):
            export.verify(other, [x, x], 1e-4)


def test_a_pt_becomes_safetensors(tmp_path):
    """What shapes can't tell (cosine schedule, heads) survives."""
    config = SMALL.replace(noise_schedule="cosine", num_head_channels=None, num_heads=4)
    state_dict = golden.fill(UNet(config)).state_dict()
    torch.save({"ema": state_dict}, tmp_path / "own.pt")
    out, fields = tmp_path / "own.safetensors", json.dumps(dataclasses.asdict(config))
    given = ["--checkpoint", tmp_path / "own.pt", "--unet", fields, "--out", out]
    run("--format", "safetensors", *given)
    assert read_unet_config(out) == config
    unet = UNet(read_unet_config(out))
    load_checkpoint(unet, out)
    assert all(torch.equal(state_dict[key], x) for key, x in unet.state_dict().items())
    half = tmp_path / "half.safetensors"  # the architecture is read from the file itself
    run("--format", "safetensors", "--dtype", "float16", "--checkpoint", out, "--out", half)
    assert read_unet_config(half) == config
    assert half.stat().st_size < 0.6 * out.stat().st_size


def test_weights_too_large_for_half_precision(tmp_path):
    torch.save({key: 1e6 * x for key, x in UNet(SMALL).state_dict().items()}, tmp_path / "big.pt")
    said = refusal(
        "--format", "safetensors", "--dtype", "float16", "--out", tmp_path / "a.safetensors",
        "--checkpoint", tmp_path / "big.pt", "--unet", FIELDS,
    )  # fmt: skip
    assert "not finite in torch.float16" in said
    assert leftovers(tmp_path) == ["big.pt"]


def test_a_training_checkpoint_gives_its_part_of_the_u_net(trained, tmp_path):
    """It has neither output layer nor label embedding nor the blocks after the last tap."""
    config = SMALL.replace(num_classes=5)
    unet = golden.fill(UNet(config.replace(num_classes=None), 6))
    backbone = DiffusionBackbone(unet, blocks=(6,), out_strides=None)
    torch.save(
        {"state_dict": {f"backbone.{key}": x for key, x in backbone.state_dict().items()}},
        tmp_path / "iter_10.pth",
    )
    out = tmp_path / "part.safetensors"
    fields = json.dumps(dataclasses.asdict(config))
    arguments = ["--checkpoint", tmp_path / "iter_10.pth", "--unet", fields, "--out", out]
    run("--format", "safetensors", *arguments)
    assert read_unet_config(out) == config.replace(num_classes=None)
    ours = DiffusionBackbone(
        read_unet_config(out), out, blocks=(6,), out_strides=None, out_channels=None
    ).unet.state_dict()
    assert list(ours) == list(unet.state_dict())
    assert all(torch.equal(x, ours[key]) for key, x in unet.state_dict().items())


@needs_export
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--checkpoint {u_net} --blocks 6 4 --size 31", "at least 32"),
        ("--checkpoint {u_net} --blocks 10", "from 1 to 9"),
        ("--checkpoint {u_net} --blocks 6 4 --unet tiny", "another archit"),
        ("--checkpoint {u_net} --blocks 6 4 --feedback all", "Missing key(s)"),
        (
            "--checkpoint {whole} --unet {fields} --blocks 6 4",
            "Unexpected key(s)",
        ),
        ("--checkpoint {other} --blocks 6 4 --feedback none --layers {digest}", "U-Net has others"),
    ],
)
def test_what_does_not_fit_is_refused(weights, trained, tmp_path, monkeypatch, arguments, message):
    _, folder = trained
    other = golden.fill(UNet(SMALL))
    with torch.no_grad():
        other.time_embed[0].weight.add_(1)
    save_safetensors(tmp_path / "other.safetensors", other.state_dict(), SMALL)
    names = {"u_net": weights, "other": tmp_path / "other.safetensors", "fields": FIELDS}
    names |= {name: folder / f"{name}.pth" for name in ("whole", "digest")}
    monkeypatch.setattr(torch.export, "export", None)
    options = [word.format(**names) for word in arguments.split()]
    assert message in refusal("--format", "pt2", "--out", tmp_path / "a.pt2", *options)
    assert leftovers(tmp_path) == ["other.safetensors"]
