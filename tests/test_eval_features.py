"""The feature cache: content, refusals, interrupted writers."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")

from diffbackbone import DiffusionBackbone, UNet, UNetConfig
from diffbackbone.eval import features as module
from diffbackbone.eval.data import ImageFolder, Listing
from diffbackbone.eval.features import FeatureCache, FeatureSpec, write_cache
from diffbackbone.utils import UserError

COUNT, SIZE, STEPS, BLOCKS = 11, 32, (50, 150), (19, 24)
SHAPES = {(t, b): (c, 1, 1) for t in STEPS for b, c in ((19, 96), (24, 64))}
SPEC = FeatureSpec(STEPS, BLOCKS, SIZE, pool=1)
ALONE = SimpleNamespace(
    process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None
)


def make_backbone(**options) -> DiffusionBackbone:
    torch.manual_seed(0)
    unet = UNet(UNetConfig.from_preset("tiny"), last_block=options.pop("last", 24))
    for parameter in unet.parameters():
        if not parameter.any():  # layers that start at zero
            torch.nn.init.normal_(parameter, std=0.02)
    options = {"timestep": 150, "blocks": (24,), "freeze": True, **options}
    return DiffusionBackbone(unet, out_channels=None, out_strides=None, **options)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


@pytest.fixture(scope="module")
def images():
    return torch.rand(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


LISTING = Listing(
    tuple(f"class{i % 3}/{i}.png" for i in range(COUNT)),
    tuple(i % 3 for i in range(COUNT)),
    tuple(100 + i for i in range(COUNT)),
    tuple(10**18 + i for i in range(COUNT)),
    ("class0", "class1", "class2"),
)


@pytest.fixture(scope="module")
def settings(backbone):
    return SPEC.settings(backbone, ImageFolder("root", LISTING))


def values(rows) -> dict:
    """Features that tell their row, for tests that need no U-Net."""
    return {
        (t, b): torch.as_tensor(rows).reshape(-1, 1, 1, 1).expand(-1, *shape).half() + t + b / 64
        for (t, b), shape in SHAPES.items()
    }


def compute(batches):
    for rows in batches:
        yield values(rows)


def write(folder, settings, compute=compute, listing=LISTING, state=ALONE, **options):
    return write_cache(folder, settings, listing, SHAPES, compute, state, batch=2, **options)


def check_content(cache: FeatureCache) -> None:
    rows = [7, 0, 10, 3, 3]
    found = cache.read(rows)
    for tap, expected in values(rows).items():
        assert torch.equal(found[tap], expected)


def snapshot(folder) -> dict:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name[0] != "."}


# ----------------------------------------------------------------------------------- features


def test_extraction_pools_down_only_and_rounds(backbone, images):
    raw = backbone.forward_taps(images[:3], (150,), (24, 19))
    found = FeatureSpec((150,), (24, 19), SIZE, pool=1).extract(backbone, images[:3])
    assert found[150, 24].dtype == torch.float16
    assert torch.equal(found[150, 24], F.adaptive_avg_pool2d(raw[150, 24], 1).half())
    whole = FeatureSpec((150,), (24,), SIZE, pool=7, dtype="float32").extract(backbone, images[:3])
    assert torch.equal(whole[150, 24], raw[150, 24])
    assert not found[150, 24].requires_grad


def test_small_batches_are_filled_up(backbone, images, monkeypatch):
    sizes = []
    original = backbone.forward_taps
    monkeypatch.setattr(
        backbone, "forward_taps", lambda x, *args: sizes.append(len(x)) or original(x, *args)
    )
    spec = FeatureSpec((150,), (24,), SIZE, dtype="float32", batch=5)
    found = spec.extract(backbone, images[:3])[150, 24]
    assert sizes == [5]
    assert torch.equal(found, spec.extract(backbone, images[:5])[150, 24][:3])


@pytest.mark.parametrize("pool", [None, 1, 3])
def test_shapes_are_those_of_the_features(images, pool):
    backbone = make_backbone(last=30)
    spec = FeatureSpec((1, 2), (19, 24, 30), SIZE, pool)
    found = spec.extract(backbone, images[:1])
    assert {tap: tuple(x.shape[1:]) for tap, x in found.items()} == spec.shapes(backbone.unet)


@pytest.mark.parametrize("bias", [1e6, float("nan")])
def test_values_that_do_not_fit_are_an_error(images, bias):
    backbone = make_backbone()
    with torch.no_grad():
        backbone.unet.module(24)[0].out_layers[-1].bias += bias
    with pytest.raises(UserError, match=r"t=150, b=24 don't fit into float16"):
        FeatureSpec((150,), (24,), SIZE).extract(backbone, images[:2])
    if bias == 1e6:
        FeatureSpec((150,), (24,), SIZE, dtype="float32").extract(backbone, images[:2])


@pytest.mark.parametrize(
    "options", [{"freeze": False}, {"feedback": "windowed"}, {"noise": "random"}]
)
def test_features_that_change_are_refused(options):
    with pytest.raises(UserError, match="stay the same"):
        SPEC.settings(make_backbone(**options), ImageFolder("root", LISTING))


# ---------------------------------------------------------------------------------- whole caches


def test_cache_gives_back_the_features(tmp_path, backbone, images, settings):
    def compute(batches):
        for rows in batches:
            yield SPEC.extract(backbone, images[rows])

    cache = write(tmp_path, settings, compute)
    assert len(cache) == COUNT
    assert cache.listing == LISTING
    assert cache.labels.tolist() == list(LISTING.labels)
    assert {p.name for p in tmp_path.glob("*.npy")} == {f"t{t}.b{b}.npy" for t, b in SHAPES}
    order = torch.randperm(COUNT).tolist()
    expected = SPEC.extract(backbone, images)
    for tap, x in FeatureCache(tmp_path).read(order).items():
        assert x.dtype == torch.float16
        assert torch.allclose(x.float(), expected[tap][order].float(), atol=1e-3, rtol=1e-3)
    assert list(cache.read([0], [(50, 19)])) == [(50, 19)]
    with pytest.raises(KeyError):
        cache.read([0], [(1, 2)])
    with pytest.raises(IndexError):
        cache.read([COUNT])
    assert np.load(tmp_path / "t50.b19.npy", mmap_mode="r").shape == (COUNT, 96, 1, 1)


def test_whole_cache_is_not_computed_again(tmp_path, settings):
    write(tmp_path, settings)
    check_content(write(tmp_path, settings, lambda batches: pytest.fail("computed again")))


def test_two_copies_follow_one_another(tmp_path, settings):
    cache = write(tmp_path, {**settings, "copies": 2})
    assert len(cache) == 2 * COUNT
    assert cache.copies == 2
    row = COUNT + 4
    assert torch.equal(cache.read([row])[50, 19], values([row])[50, 19])


def test_processes_share_the_rows(tmp_path, settings):
    barrier = threading.Barrier(2)
    rows: list[list[int]] = [[], []]
    opened = {}

    def work(rank):
        def compute(batches):
            rows[rank] += [row for batch in batches for row in batch]
            for batch in batches:
                yield values(batch)

        state = SimpleNamespace(
            process_index=rank,
            num_processes=2,
            is_main_process=rank == 0,
            wait_for_everyone=lambda: barrier.wait(10),
        )
        opened[rank] = write(tmp_path, settings, compute, state=state)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert rows[0]
    assert rows[1]
    assert sorted(rows[0] + rows[1]) == list(range(COUNT))
    check_content(opened[1])
    write(tmp_path / "alone", settings)
    assert snapshot(tmp_path) == snapshot(tmp_path / "alone")


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "options", "spec"),
    [
        ("timesteps", {}, FeatureSpec((50, 151), BLOCKS, SIZE, 1)),
        ("blocks", {}, FeatureSpec(STEPS, (19, 23), SIZE, 1)),
        ("noise", {"noise": "none"}, SPEC),
        ("seed", {"seed": 3}, SPEC),
        ("pool", {}, FeatureSpec(STEPS, BLOCKS, SIZE, 2)),
        ("dtype", {}, FeatureSpec(STEPS, BLOCKS, SIZE, 1, "float32")),
        ("image_size", {}, FeatureSpec(STEPS, BLOCKS, 64, 1)),
        ("precision", {}, FeatureSpec(STEPS, BLOCKS, SIZE, 1, compute=torch.bfloat16)),
        ("weights_sha256", {"last": 23, "blocks": (23,)}, SPEC),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, settings, name, options, spec):
    write(tmp_path, settings)
    before = snapshot(tmp_path)
    other = spec.settings(make_backbone(**options), ImageFolder("root", LISTING))
    with pytest.raises(UserError, match=rf"other settings:\n  {name}: "):
        write(tmp_path, other)
    assert snapshot(tmp_path) == before
    check_content(
        write(tmp_path, other, overwrite=True) if name == "noise" else write(tmp_path, settings)
    )


@pytest.mark.parametrize(
    ("field", "value"), [("mtimes", 5), ("sizes", 5), ("labels", 2), ("paths", "class1/new.png")]
)
def test_other_images_are_refused_by_name(tmp_path, backbone, settings, field, value):
    write(tmp_path, settings)
    columns = {
        name: list(getattr(LISTING, name)) for name in ("paths", "labels", "sizes", "mtimes")
    }
    columns[field][4] = value
    changed = Listing(**{k: tuple(v) for k, v in columns.items()}, classes=LISTING.classes)
    other = SPEC.settings(backbone, ImageFolder("root", changed))
    with pytest.raises(UserError, match=r"images_sha256: (.|\n)*image class1/4.png"):
        write(tmp_path, other, listing=changed)


def test_folder_of_something_else_is_left_alone(tmp_path, settings):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"other files \(thesis.tex"):
            write(tmp_path, settings, overwrite=overwrite)
    (tmp_path / "manifest.json").write_text('{"name": "somebody else\'s"}')
    with pytest.raises(UserError, match="not of a feature cache"):
        write(tmp_path, settings)
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.tex", "manifest.json", ".lock"}
    with pytest.raises(UserError, match="no feature cache"):
        FeatureCache(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncate", "remove", "header"])
def test_broken_cache_is_named(tmp_path, settings, damage):
    write(tmp_path, settings)
    path = tmp_path / "t150.b24.npy"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-2])
    elif damage == "remove":
        path.unlink()
    else:  # the same length, another shape
        path.write_bytes(content.replace(b"(11, 64, 1, 1)", b"(11, 32, 2, 1)"))
    with pytest.raises(UserError, match=r"is broken: t150.b24.npy"):
        FeatureCache(tmp_path)


# ---------------------------------------------------------------------------- interrupted writers


def test_stopped_writer_is_completed_not_trusted(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0)
    computed = []

    def stop(batches):
        for rows in batches:
            if 7 in rows:
                raise KeyboardInterrupt
            yield values(rows)

    def record(batches):
        computed.extend(int(row) for batch in batches for row in batch)
        return compute(batches)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, settings, stop)
    with pytest.raises(UserError, match="partial"):
        FeatureCache(tmp_path)
    with pytest.raises(UserError, match="pool"):  # a partial one of other settings
        write(tmp_path, {**settings, "pool": 9})
    check_content(write(tmp_path, settings, record))
    assert computed == list(range(6, COUNT))
    write(tmp_path / "whole", settings)
    assert snapshot(tmp_path) == snapshot(tmp_path / "whole")


def test_killed_writer_is_completed(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0)
    folder = tmp_path / "killed"

    def slow(batches):
        for rows in batches:
            time.sleep(0.01)
            yield values(rows)

    for delay in (0.005, 0.03, 0.05):
        child = os.fork()
        if child == 0:
            write(folder, settings, slow)
            os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    check_content(write(folder, settings))
    write(tmp_path / "whole", settings)
    assert snapshot(folder) == snapshot(tmp_path / "whole")


def test_full_disk_is_an_error_before_work(tmp_path, settings, monkeypatch):
    def fail(batches):
        pytest.fail("work was begun")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # signal ignored by Python
    try:
        with pytest.raises(OSError, match="large"):
            write(tmp_path, settings, fail)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(UserError, match="no feature cache"):
        FeatureCache(tmp_path)
    usage = SimpleNamespace(free=COUNT * 2 * (96 + 64) * 2 - 1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="the disk has"):
        write(tmp_path, settings, fail)
    usage.free += 1
    check_content(write(tmp_path, settings))


def test_second_writer_is_kept_out(tmp_path, settings):
    def intrude(batches):
        for rows in batches:
            with pytest.raises(UserError, match="another process is writing"):
                write(tmp_path, settings)
            yield values(rows)

    check_content(write(tmp_path, settings, intrude))
