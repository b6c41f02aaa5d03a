"""The feature cache: what it holds, what it refuses, and what a stopped writer leaves."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffbackbone import DiffusionBackbone, UNet, UNetConfig
from diffbackbone import features as module
from diffbackbone.features import (
    CacheError,
    FeatureCache,
    Listing,
    extract_features,
    feature_settings,
    tap_shapes,
    weights_digest,
    write_cache,
)

pytestmark = pytest.mark.filterwarnings("ignore:DiffusionBackbone. no checkpoint")

COUNT, SIZE, STEPS, BLOCKS, POOL = 11, 32, (50, 150), (19, 24), 1
SHAPES = {(t, b): (c, 1, 1) for t in STEPS for b, c in ((19, 96), (24, 64))}


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


@pytest.fixture(scope="module")
def listing():
    return Listing(
        tuple(f"class{i % 3}/{i}.png" for i in range(COUNT)),
        tuple(i % 3 for i in range(COUNT)),
        tuple(100 + i for i in range(COUNT)),
        tuple(10**18 + i for i in range(COUNT)),
        ("class0", "class1", "class2"),
    )


@pytest.fixture(scope="module")
def settings(backbone, listing):
    return feature_settings(backbone, STEPS, BLOCKS, listing, image_size=SIZE, pool=POOL)


def values(rows) -> dict:
    """Features that tell their row, for tests that need no U-Net."""
    return {
        (t, b): torch.tensor(rows).reshape(-1, 1, 1, 1).expand(-1, *shape).half() + t + b / 64
        for (t, b), shape in SHAPES.items()
    }


def compute(batches):
    for rows in batches:
        yield values(rows)


ROW_BYTES = 96 * 2
THREE_ROWS = {"shard_bytes": 3 * ROW_BYTES, "batch_size": 2}


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
    found = extract_features(backbone, images[:3], (150,), (24, 19), pool=1)
    assert found[150, 24].dtype == torch.float16
    expected = F.adaptive_avg_pool2d(raw[150, 24], 1).half()
    assert torch.equal(found[150, 24], expected)
    whole = extract_features(backbone, images[:3], (150,), (24,), pool=7, dtype=torch.float32)
    assert torch.equal(whole[150, 24], raw[150, 24])
    assert not found[150, 24].requires_grad


def test_shapes_are_those_of_the_features(images):
    backbone = make_backbone(last=30)
    for pool in (None, 1, 3):
        found = extract_features(backbone, images[:1], (1, 2), (19, 24, 30), pool)
        shapes = tap_shapes(backbone.unet.config, (1, 2), (19, 24, 30), SIZE, pool)
        assert {tap: tuple(x.shape[1:]) for tap, x in found.items()} == shapes


def test_values_beyond_half_precision_are_an_error(images):
    backbone = make_backbone()
    with torch.no_grad():
        backbone.unet.module(24)[0].out_layers[-1].bias += 1e6
    with pytest.raises(CacheError, match=r"t=150, b=24 don't fit into float16.*use float32"):
        extract_features(backbone, images[:2], (150,), (24,))
    extract_features(backbone, images[:2], (150,), (24,), dtype=torch.float32)


def test_digest_sees_every_value():
    layer = torch.nn.Linear(100, 100)
    before = weights_digest(layer)
    assert weights_digest(layer) == before
    with torch.no_grad():
        layer.weight[57, 33] += 1e-3
    assert weights_digest(layer) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": False}, "U-Net that is trained"),
        ({"feedback": "windowed"}, "trained feedback"),
        ({"noise": "random"}, "random noise"),
    ],
)
def test_features_that_change_are_refused(listing, options, message):
    with pytest.raises(CacheError, match=message):
        feature_settings(make_backbone(**options), STEPS, BLOCKS, listing, image_size=SIZE)


# ---------------------------------------------------------------------------------- whole caches


def test_cache_gives_back_the_features(tmp_path, backbone, images, listing):
    settings = feature_settings(backbone, STEPS, BLOCKS, listing, image_size=SIZE)
    shapes = tap_shapes(backbone.unet.config, STEPS, BLOCKS, SIZE)

    def compute(batches):
        for rows in batches:
            yield extract_features(backbone, images[rows], STEPS, BLOCKS)

    size = 4 * max(np.prod(shape) for shape in shapes.values()) * 2
    cache = write_cache(
        tmp_path, settings, listing, shapes, compute, batch_size=2, shard_bytes=size
    )
    assert len(cache) == COUNT
    assert cache.paths == listing.paths
    assert cache.labels.tolist() == list(listing.labels)
    assert sorted(p.name for p in tmp_path.glob("*t50.b19*")) == [
        f"shard-0000{i}.t50.b19.npy" for i in range(3)
    ]
    assert all(p.stat().st_size <= size + 128 for p in tmp_path.glob("*.npy"))
    reopened = FeatureCache(tmp_path, settings, listing)
    order = torch.randperm(COUNT).tolist()
    expected = extract_features(backbone, images, STEPS, BLOCKS)
    for tap, x in reopened.read(order).items():
        assert x.dtype == torch.float16
        assert torch.allclose(x.float(), expected[tap][order].float(), atol=1e-3, rtol=1e-3)
    with pytest.raises(KeyError, match=r"\(1, 2\)"):
        cache.read([0], [(1, 2)])
    with pytest.raises(IndexError):
        cache.read([COUNT])
    with pytest.raises(IndexError):
        cache.read([-1])


def test_reading_is_memory_mapped_and_bounded(tmp_path, settings, listing, monkeypatch):
    monkeypatch.setattr(module, "_OPEN_MAPS", 3)
    cache = write_cache(tmp_path, settings, listing, SHAPES, compute, shard_bytes=1)
    assert len(list(tmp_path.glob("*.npy"))) == COUNT * len(SHAPES)
    check_content(cache)
    assert len(cache._maps) == 3
    assert all(isinstance(x, np.memmap) for x in cache._maps.values())


def test_whole_cache_is_not_computed_again(tmp_path, settings, listing):
    write_cache(tmp_path, settings, listing, SHAPES, compute)

    def fail(batches):
        raise AssertionError("computed again")

    check_content(write_cache(tmp_path, settings, listing, SHAPES, fail))


def test_two_copies_follow_one_another(tmp_path, settings, listing):
    twice = {**settings, "copies": 2}
    cache = write_cache(tmp_path, twice, listing, SHAPES, compute, **THREE_ROWS)
    assert len(cache) == 2 * COUNT
    assert cache.copies == 2
    assert float(cache.read([COUNT + 4])[50, 19][0, 0, 0, 0]) == float(
        values([COUNT + 4])[50, 19][0, 0, 0, 0]
    )


def test_processes_share_the_shards(tmp_path, settings, listing):
    barrier = threading.Barrier(2)
    rows: list[list[int]] = [[], []]
    opened = {}

    def work(rank):
        def compute(batches):
            rows[rank] += [row for batch in batches for row in batch]
            for batch in batches:
                yield values(batch)

        opened[rank] = write_cache(
            tmp_path, settings, listing, SHAPES, compute, rank=rank, world_size=2,
            barrier=lambda: barrier.wait(10), **THREE_ROWS,
        )  # fmt: skip

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert rows[0]
    assert rows[1]
    assert sorted(rows[0] + rows[1]) == list(range(COUNT))
    check_content(opened[1])
    alone = tmp_path / "alone"
    write_cache(alone, settings, listing, SHAPES, compute, **THREE_ROWS)
    together = snapshot(tmp_path)
    assert together == snapshot(alone)


# ------------------------------------------------------------------------------------- refusals


def changed_settings(listing):
    return {
        "timesteps": lambda: (make_backbone(), (50, 151), BLOCKS, {}),
        "blocks": lambda: (make_backbone(), STEPS, (19, 23), {}),
        "noise": lambda: (make_backbone(noise="none"), STEPS, BLOCKS, {}),
        "seed": lambda: (make_backbone(seed=3), STEPS, BLOCKS, {}),
        "pool": lambda: (make_backbone(), STEPS, BLOCKS, {"pool": 2}),
        "dtype": lambda: (make_backbone(), STEPS, BLOCKS, {"dtype": "float32"}),
        "image_size": lambda: (make_backbone(), STEPS, BLOCKS, {"image_size": 64}),
        "copies": lambda: (make_backbone(), STEPS, BLOCKS, {"copies": 2}),
        "preprocessing": lambda: (make_backbone(), STEPS, BLOCKS, {"preprocessing": "crop"}),
        "precision": lambda: (make_backbone(), STEPS, BLOCKS, {"precision": "bfloat16"}),
    }


@pytest.mark.parametrize("name", list(changed_settings(None)))
def test_other_settings_are_refused_by_name(tmp_path, settings, listing, name):
    write_cache(tmp_path, settings, listing, SHAPES, compute)
    before = snapshot(tmp_path)
    backbone, steps, blocks, options = changed_settings(listing)[name]()
    options = {"image_size": SIZE, "pool": POOL, **options}
    other = feature_settings(backbone, steps, blocks, listing, **options)
    with pytest.raises(CacheError, match=f"made with other settings:\n  {name}: the cache has"):
        write_cache(tmp_path, other, listing, SHAPES, compute)
    assert snapshot(tmp_path) == before


def test_other_weights_are_refused(tmp_path, settings, listing):
    write_cache(tmp_path, settings, listing, SHAPES, compute)
    backbone = make_backbone()
    with torch.no_grad():
        backbone.unet.module(3)[0].out_layers[-1].weight[0, 0, 0, 0] += 1e-3
    other = feature_settings(backbone, STEPS, BLOCKS, listing, image_size=SIZE, pool=POOL)
    with pytest.raises(CacheError, match="weights_sha256: the cache has"):
        FeatureCache(tmp_path, other)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mtimes", 5, r"image class1/4.png: has changed"),
        ("sizes", 5, r"image class1/4.png: has changed"),
        ("labels", 2, r"image class1/4.png: has changed"),
        ("paths", "class1/new.png", r"image class1/4.png: is gone\n  image class1/new.png: is new"),
    ],
)
def test_other_images_are_refused_by_name(
    tmp_path, backbone, settings, listing, field, value, message
):
    write_cache(tmp_path, settings, listing, SHAPES, compute)
    columns = {
        name: list(getattr(listing, name)) for name in ("paths", "labels", "sizes", "mtimes")
    }
    columns[field][4] = value
    changed = Listing(**{k: tuple(v) for k, v in columns.items()}, classes=listing.classes)
    other = feature_settings(backbone, STEPS, BLOCKS, changed, image_size=SIZE, pool=POOL)
    with pytest.raises(CacheError, match=message):
        write_cache(tmp_path, other, changed, SHAPES, compute)


def test_overwriting_has_to_be_asked_for(tmp_path, settings, listing):
    other = {**settings, "preprocessing": "another"}
    write_cache(tmp_path, other, listing, SHAPES, compute, **THREE_ROWS)
    with pytest.raises(CacheError, match="preprocessing"):
        write_cache(tmp_path, settings, listing, SHAPES, compute)
    cache = write_cache(tmp_path, settings, listing, SHAPES, compute, overwrite=True)
    check_content(cache)
    assert len(list(tmp_path.glob("*.npy"))) == len(SHAPES)  # no shard of the old one is left


def test_folder_of_something_else_is_left_alone(tmp_path, settings, listing):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CacheError, match=r"other files \(thesis.tex"):
            write_cache(tmp_path, settings, listing, SHAPES, compute, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "manifest.json").write_text('{"name": "somebody else\'s"}')
    with pytest.raises(CacheError, match="does not belong to a feature cache"):
        write_cache(tmp_path, settings, listing, SHAPES, compute)
    with pytest.raises(CacheError, match="no feature cache"):
        FeatureCache(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncate", "remove", "header"])
def test_broken_cache_is_named(tmp_path, settings, listing, damage):
    write_cache(tmp_path, settings, listing, SHAPES, compute, **THREE_ROWS)
    path = tmp_path / "shard-00001.t150.b24.npy"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-2])
    elif damage == "remove":
        path.unlink()
    else:  # the same length, another shape
        path.write_bytes(content.replace(b"(3, 64, 1, 1)", b"(3, 32, 2, 1)"))
    message = r"is broken: shard-00001.t150.b24.npy"
    if damage == "header":  # seen when it is read
        with pytest.raises(CacheError, match=message):
            FeatureCache(tmp_path, settings, listing).read([4])
        return
    with pytest.raises(CacheError, match=message):
        FeatureCache(tmp_path, settings, listing)


# ---------------------------------------------------------------------------- stopped while writing


def test_stopped_writer_is_completed_not_trusted(tmp_path, settings, listing):
    computed = []

    def stop(batches):
        for rows in batches:
            if 7 in rows:
                raise KeyboardInterrupt
            yield values(rows)

    def record(batches):
        computed.extend(row for batch in batches for row in batch)
        return compute(batches)

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, settings, listing, SHAPES, stop, **THREE_ROWS)
    with pytest.raises(CacheError, match="partial cache"):
        FeatureCache(tmp_path)
    assert not list(tmp_path.glob(".*.writing"))
    with pytest.raises(CacheError, match="pool"):  # a partial one of other settings
        write_cache(tmp_path, {**settings, "pool": 9}, listing, SHAPES, compute)
    check_content(write_cache(tmp_path, settings, listing, SHAPES, record, **THREE_ROWS))
    assert computed == list(range(6, COUNT))  # the two whole shards were kept
    whole = tmp_path / "whole"
    write_cache(whole, settings, listing, SHAPES, compute, **THREE_ROWS)
    assert snapshot(tmp_path) == snapshot(whole)


def test_killed_writer_is_completed(tmp_path, settings, listing):
    whole = tmp_path / "whole"
    write_cache(whole, settings, listing, SHAPES, compute, **THREE_ROWS)
    folder = tmp_path / "killed"

    def slow(batches):
        for rows in batches:
            time.sleep(0.01)
            yield values(rows)

    for delay in (0.005, 0.03, 0.05):
        child = os.fork()
        if child == 0:
            write_cache(folder, settings, listing, SHAPES, slow, **THREE_ROWS)
            os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not (folder / "manifest.json").is_file():
            with pytest.raises(CacheError, match=r"partial cache|no feature cache|cannot be read"):
                FeatureCache(folder, settings)
    check_content(write_cache(folder, settings, listing, SHAPES, compute, **THREE_ROWS))
    assert snapshot(folder) == snapshot(whole)
    assert not list(folder.glob(".*.writing"))


def test_full_disk_is_said_and_leaves_no_broken_cache(tmp_path, settings, listing):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {tap: (4096, 1, 1) for tap in SHAPES}

    def large(batches):
        for rows in batches:
            yield {tap: torch.ones(len(rows), 4096, 1, 1).half() for tap in big}

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # signal ignored by Python
    try:
        with pytest.raises(CacheError, match="the disk is full"):
            write_cache(tmp_path, settings, listing, big, large, batch_size=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.npy"))
    assert not list(tmp_path.glob(".*.writing"))
    with pytest.raises(CacheError, match="partial cache"):
        FeatureCache(tmp_path)
    cache = write_cache(tmp_path, settings, listing, big, large, batch_size=2)
    assert cache.read([10])[50, 24].eq(1).all()


def test_too_small_a_disk_is_seen_before_work(tmp_path, settings, listing, monkeypatch):
    usage = type("Usage", (), {"free": COUNT * 2 * (96 + 64) * 2 - 1})()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)

    def fail(batches):
        raise AssertionError("work was begun")

    with pytest.raises(CacheError, match=r"needs 6.875 KiB and the disk has 6.874 KiB left"):
        write_cache(tmp_path, settings, listing, SHAPES, fail)
    usage.free += 1
    write_cache(tmp_path, settings, listing, SHAPES, compute)


def test_second_writer_is_kept_out(tmp_path, settings, listing):
    def intrude(batches):
        for rows in batches:
            with pytest.raises(CacheError, match="another process is writing"):
                write_cache(tmp_path, settings, listing, SHAPES, compute)
            yield values(rows)

    check_content(write_cache(tmp_path, settings, listing, SHAPES, intrude, **THREE_ROWS))


@pytest.mark.parametrize("fault", ["short", "shape", "dtype", "tap"])
def test_wrong_features_are_not_written(tmp_path, settings, listing, fault):
    def wrong(batches):
        for number, rows in enumerate(batches):
            found = values(rows)
            if fault == "short" and number == 2:
                return
            if fault == "shape":
                found[50, 19] = found[50, 19][1:]
            elif fault == "dtype":
                found[50, 19] = found[50, 19].float()
            elif fault == "tap":
                del found[50, 19]
            yield found

    with pytest.raises(CacheError, match="expected"):
        write_cache(tmp_path, settings, listing, SHAPES, wrong, **THREE_ROWS)
    assert not (tmp_path / "manifest.json").exists()


def test_manifest_is_plain_json(tmp_path, settings, listing):
    write_cache(tmp_path, settings, listing, SHAPES, compute)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"] == settings
    assert settings["unet"]["model_channels"] == 32
    assert settings["data"]["images"] == COUNT
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".json") == [
        "manifest.json",
        "samples.json",
    ]
    manifest["version"] = 99
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="version 99"):
        FeatureCache(tmp_path)
