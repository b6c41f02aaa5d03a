"""`torch.export` of a frozen backbone: the same maps as eager, saved and loaded again."""

from __future__ import annotations

import golden
import pytest
import torch

from diffbackbone import DiffusionBackbone, UNetConfig

SMALL = UNetConfig(32, (1, 1), 1, (2,), num_head_channels=16)
pytestmark = [
    pytest.mark.skipif(
        not hasattr(torch.compiler, "is_exporting"), reason="torch.export is too young before 2.7"
    ),
    pytest.mark.filterwarnings("ignore:.*weights are RANDOM"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # torch's own reader
]


def build(unet=SMALL, **kwargs) -> DiffusionBackbone:
    if unet != "tiny":
        kwargs = {"blocks": (6, 4), "out_strides": (2, 4), **kwargs}
    backbone = DiffusionBackbone(unet, **{"freeze": True, "out_channels": 8, **kwargs})
    return golden.fill(backbone).eval()


def images(seed, n=2, height=50, width=70) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def difference(ours, expected) -> float:
    assert [x.shape for x in ours] == [x.shape for x in expected]
    assert [x.dtype for x in ours] == [x.dtype for x in expected]
    return max(float((x - y).norm() / y.norm()) for x, y in zip(ours, expected))


def export(backbone, path=None, x=None) -> torch.export.ExportedProgram:
    """The program; as it comes back from the file where a path is given."""
    program = torch.export.export(backbone, (images(0) if x is None else x,))
    if path is not None:
        torch.export.save(program, path)
        program = torch.export.load(path)
    return program


def test_tiny_exports(tmp_path):
    backbone = build("tiny", blocks=(16, 10), out_strides=(8, 32))
    program = export(backbone, tmp_path / "tiny.pt2", images(0, 2, 64, 96)).module()
    x = images(1, 2, 64, 96)
    with torch.no_grad():
        assert difference(program(x), backbone(x)) < 1e-5
    with pytest.raises(Exception, match=r"size\(\)|shape"):  # another size is refused
        program(images(0, 2, 64, 128))


LABELLED = {"unet": SMALL.replace(num_classes=5), "class_label": 3}
SETTINGS = {
    "difffeed": {"feedback": {5: 2}},
    "fine-tuned": {**LABELLED, "freeze": False, "activation_checkpointing": True},
    "raw": {"noise": "none", "out_channels": None, "out_strides": None},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_export(tmp_path, settings):
    backbone = build(**settings)
    program = export(backbone, tmp_path / "small.pt2").module()
    x = images(1)
    with torch.no_grad():
        assert difference(program(x), backbone(x)) < 1e-5
    wild = 255 * x  # a program doesn't look at values, eager does
    assert all(maps.isfinite().all() for maps in program(wild))
    with pytest.raises(ValueError, match="mean 127.5"):
        backbone(wild)


def test_fresh_noise_stays_fresh(tmp_path):
    """The program draws from the caller's generator, as eager does."""
    backbone = build(noise="random")
    program = export(backbone, tmp_path / "fresh.pt2").module()
    x = images(1)
    with torch.no_grad():
        torch.manual_seed(3)
        first, second = program(x), program(x)
        assert difference(second, first) > 1e-2
        torch.manual_seed(3)
        assert difference(backbone(x), first) < 1e-5


@pytest.mark.filterwarnings("error:.*assigned during export")  # tracing must keep nothing
def test_kept_noise_becomes_a_constant():
    """Fixed noise is a hash of coordinates, whose operations few runtimes for inference have."""

    def hashes(program) -> bool:
        return any("__xor__" in str(node.target) for node in program.graph.nodes)

    backbone = build(blocks=(4,), out_strides=(4,))
    with torch.no_grad():
        backbone(images(0))  # keeps the noise of this size
    for height, seed, constant in ((50, 0, True), (100, 0, False), (50, 1, False)):
        backbone.seed = seed
        x = images(1, 1, height)
        program = export(backbone, x=x)
        assert hashes(program) != constant
        with torch.no_grad():
            expected = build(blocks=(4,), out_strides=(4,), seed=seed)(x)
            assert difference(program.module()(x), expected) < 1e-5
            assert difference(backbone(x), expected) < 1e-5
