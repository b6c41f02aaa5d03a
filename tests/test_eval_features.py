"""The feature cache: content, other settings, interrupted writers, other families of networks."""

from __future__ import annotations

import os
import resource
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")

from image_folders import fill_zeros, write_folder
from test_models_base import ToyUNet

from diffbackbone import DiffusionBackbone, UNet, UNetConfig
from diffbackbone.eval import features as module
from diffbackbone.eval.data import ImageFolder, RowImages, list_folder
from diffbackbone.eval.features import CachedRows, FeatureCache, FeatureSpec, open_caches
from diffbackbone.utils import UserError

SIZE, STEPS, BLOCKS = 32, (50, 150), (19, 24)
ALONE = SimpleNamespace(
    process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None,
    device=torch.device("cpu"),
)  # fmt: skip


def make_backbone(network=None, **options) -> DiffusionBackbone:
    torch.manual_seed(0)
    if network is None:
        network = fill_zeros(UNet(UNetConfig.from_preset("tiny"), options.pop("last", 24)))
    options = {"timestep": 150, "blocks": (network.last_block,), "freeze": True, **options}
    return DiffusionBackbone(network, out_channels=None, out_strides=None, **options)


class RowSpec(FeatureSpec):
    """Features that tell their row, for tests that need no U-Net."""

    def extract(self, backbone, images):
        rows = images.reshape(-1, 1, 1, 1)
        return {
            (t, b): (rows + t + b / 64).half().expand(-1, *self.shape(backbone.unet.blocks[b]))
            for t, b in self.taps
        }


SPEC = RowSpec(STEPS, BLOCKS, SIZE, pool=1, batch=2)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ImageFolder:
    root = tmp_path_factory.mktemp("images")
    write_folder(root, 4, seed=0)
    return list_folder(root).subset(range(11))


@pytest.fixture
def computed(monkeypatch):
    """Load row numbers in place of images; return those that were asked for."""
    rows: list[int] = []

    def load(dataset, batches, workers):
        for batch in batches:
            rows.extend(map(int, batch))
            yield torch.as_tensor(np.array(batch))

    monkeypatch.setattr(module, "load_batches", load)
    return rows


def write(root, folder, backbone, spec=SPEC, state=ALONE, overwrite=False, mirrored=()):
    config = SimpleNamespace(cache=root, workers=0, overwrite_cache=overwrite)
    return open_caches(config, {"cache": folder}, backbone, spec, state, mirrored)[0]


def check_content(cache: FeatureCache) -> None:
    rows = [7, 0, 10, 3, 3]
    for t, b in cache.taps:
        assert cache.read(rows, (t, b))[:, 0, 0, 0].tolist() == [
            float(np.float16(row + t + b / 64)) for row in rows
        ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name[0] != "."}


def test_extraction_pools_rounds_and_fills_up(backbone, images, monkeypatch):
    raw = backbone.forward_taps(images[:3], (150,), (24, 19))
    found = FeatureSpec((150,), (24, 19), SIZE, pool=1).extract(backbone, images[:3])
    assert found[150, 24].dtype == torch.float16
    assert torch.equal(found[150, 24], F.adaptive_avg_pool2d(raw[150, 24], 1).half())
    assert not found[150, 24].requires_grad
    whole = FeatureSpec((150,), (24,), SIZE, pool=7, dtype="float32").extract(backbone, images[:3])
    assert torch.equal(whole[150, 24], raw[150, 24])  # never pooled up
    sizes, original = [], backbone.forward_taps
    monkeypatch.setattr(
        backbone, "forward_taps", lambda x, *args: sizes.append(len(x)) or original(x, *args)
    )
    spec = FeatureSpec((150,), (24,), SIZE, dtype="float32", batch=5)
    few = spec.extract(backbone, images[:3])[150, 24]
    assert sizes == [5]  # a small batch is filled up
    assert torch.equal(few, spec.extract(backbone, images)[150, 24][:3])


@pytest.mark.parametrize("bias", [1e6, float("nan")])
def test_values_that_do_not_fit_are_an_error(images, bias):
    backbone = make_backbone()
    with torch.no_grad():
        backbone.unet.module(24)[0].out_layers[-1].bias += bias
    with pytest.raises(UserError, match=r"t=150, b=24 don't fit into float16"):
        FeatureSpec((150,), (24,), SIZE).extract(backbone, images[:2])


@pytest.mark.parametrize(
    "options", [{"freeze": False}, {"feedback": "windowed"}, {"noise": "random"}]
)
def test_features_that_change_are_not_cached(folder, options):
    with pytest.raises(UserError, match="constant features"):
        SPEC.settings(make_backbone(**options), folder)


@pytest.mark.parametrize("family", ["guided-diffusion", "toy"])
def test_cache_gives_back_the_features_of_any_network(tmp_path, folder, family):
    """Pooled and unpooled maps, and mirrored copies."""
    blocks = (19, 24) if family == "guided-diffusion" else (3, 7)
    backbone = make_backbone(None if family == "guided-diffusion" else ToyUNet())
    spec = FeatureSpec(STEPS, blocks, SIZE, pool=3, batch=4)
    cache = write(tmp_path, folder, backbone, spec, mirrored={"cache"})
    assert (len(cache), cache.paths, cache.labels.tolist()) == (
        11, folder.paths, folder.labels.tolist()
    )  # fmt: skip
    rows = RowImages(folder, SIZE)
    batch = torch.stack([rows[0, row] for row in range(22)])
    order = torch.randperm(22).tolist()
    for tap, x in spec.extract(backbone, batch).items():
        found = cache.read(order, tap)
        assert found.shape[1:] == spec.shape(backbone.unet.blocks[tap[1]])
        assert torch.allclose(found.float(), x[order].float(), atol=1e-3, rtol=1e-3)
        assert torch.equal(cache.images(tap), cache.read(range(11), tap))
    part = CachedRows(folder.subset([5, 2]), cache)
    assert torch.equal(part[0, 0][50, blocks[0]], cache.read(5, (50, blocks[0])))
    assert torch.equal(part[0, 3][50, blocks[0]], cache.read(11 + 2, (50, blocks[0])))
    with pytest.raises(KeyError):
        cache.read([0], (1, 2))


def test_processes_share_the_rows(tmp_path, folder, backbone, computed):
    barrier, opened = threading.Barrier(2), {}

    def work(rank):
        state = SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0,
            wait_for_everyone=lambda: barrier.wait(10), device=torch.device("cpu"),
        )  # fmt: skip
        opened[rank] = write(tmp_path / "both", folder, backbone, state=state)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(computed) == list(range(11))
    check_content(opened[1])
    computed.clear()
    write(tmp_path / "both", folder, backbone)  # whole
    assert not computed
    write(tmp_path / "alone", folder, backbone)
    assert snapshot(tmp_path / "both/cache") == snapshot(tmp_path / "alone/cache")


@pytest.mark.parametrize(
    ("name", "options", "changes"),
    [
        ("timesteps", {}, {"timesteps": (50, 151)}),
        ("blocks", {}, {"blocks": (19, 23)}),
        ("noise", {"noise": "none"}, {}),
        ("seed", {"seed": 3}, {}),
        ("dtype", {}, {"dtype": "float32"}),
        ("precision", {}, {"compute": torch.bfloat16}),
        ("weights_sha256", {"last": 23}, {}),
        ("copies", {}, {}),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path, folder, backbone, computed, name, options, changes
):
    write(tmp_path, folder, backbone)
    before = snapshot(tmp_path / "cache")
    other = make_backbone(**options) if options else backbone
    mirrored = {"cache"} if name == "copies" else ()
    with pytest.raises(UserError, match=rf"other settings:\n  {name}: "):
        write(tmp_path, folder, other, replace(SPEC, **changes), mirrored=mirrored)
    assert snapshot(tmp_path / "cache") == before
    if name == "noise":
        check_content(write(tmp_path, folder, other, overwrite=True))


def test_other_images_and_foreign_folders_are_left_alone(tmp_path, folder, backbone, computed):
    write(tmp_path, folder, backbone)
    with pytest.raises(UserError, match=r"images_sha256: "):
        write(tmp_path, folder.subset(range(11)[::-1]), backbone)
    (tmp_path / "cache/t50.b19.npy").unlink()
    with pytest.raises(FileNotFoundError):
        FeatureCache(tmp_path / "cache")
    foreign = tmp_path / "foreign/cache"
    foreign.mkdir(parents=True)
    (foreign / "manifest.json").write_text('{"name": "somebody else\'s"}')
    for overwrite in (False, True):
        with pytest.raises(KeyError):
            write(tmp_path / "foreign", folder, backbone, overwrite=overwrite)
    assert snapshot(foreign).keys() == {"manifest.json"}


def test_killed_writer_is_completed_not_trusted(tmp_path, folder, backbone, computed, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0)

    class Killed(RowSpec):
        def extract(self, backbone, images):
            if 7 in images:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().extract(backbone, images)

    child = os.fork()
    if child == 0:
        write(tmp_path, folder, backbone, Killed(**vars(SPEC)))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with pytest.raises(UserError, match="partial"):
        FeatureCache(tmp_path / "cache")
    with pytest.raises(UserError, match="pool"):  # a partial one of other settings
        write(tmp_path, folder, backbone, replace(SPEC, pool=9))
    assert not computed
    check_content(write(tmp_path, folder, backbone))
    assert computed == list(range(6, 11))
    write(tmp_path / "whole", folder, backbone)
    assert snapshot(tmp_path / "cache") == snapshot(tmp_path / "whole/cache")


def test_full_disk_is_an_error_before_work(tmp_path, folder, backbone, computed):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # signal ignored by Python
    try:
        with pytest.raises(OSError, match="large"):
            write(tmp_path, folder, backbone)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not computed
    with pytest.raises(FileNotFoundError):
        FeatureCache(tmp_path / "cache")
    check_content(write(tmp_path, folder, backbone))


def test_second_writer_is_kept_out(tmp_path, folder, backbone, computed):
    class Intruded(RowSpec):
        def extract(self, backbone, images):
            with pytest.raises(TimeoutError):
                write(tmp_path, folder, backbone)
            return super().extract(backbone, images)

    check_content(write(tmp_path, folder, backbone, Intruded(**vars(SPEC))))
