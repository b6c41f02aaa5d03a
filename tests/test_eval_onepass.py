"""Linear probes of many cells in one run of the network."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

import forked
import image_folders
from accelerate import PartialState

from diffbackbone import UNetConfig
from diffbackbone.costs import counting_flops
from diffbackbone.eval import onepass, sweep
from diffbackbone.eval.data import RowImages, list_folder
from diffbackbone.eval.features import FeatureSpec
from diffbackbone.eval.options import build_backbone
from diffbackbone.eval.probe import linear_accuracy
from diffbackbone.utils import UserError

weights = image_folders.weights
one_thread = image_folders.one_thread
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    image_folders.write_folder(root / "train", 12, 0)
    image_folders.write_folder(root / "val", 6, 1)
    return root


@pytest.fixture
def make(weights, tmp_path):
    """Build a trainer."""

    def build(
        blocks=(12, 24), timesteps=(30, 90), pools=(1, 2), lr=(1e-3, 1e-2), folder=None, **options
    ):
        config = sweep.SweepConfig(
            unet="tiny", checkpoint=weights, blocks=blocks, timesteps=timesteps, device="cpu"
        )
        state = PartialState(cpu=True)
        spec = FeatureSpec(timesteps, blocks, 32, batch=8)
        settings = onepass.OnePassOptions(lr=lr, **{"epochs": 2, **options})
        backbone, out = build_backbone(config).eval(), folder or tmp_path / "probes"
        return onepass.OnePass(settings, backbone, spec, pools, out, 0, state)

    return build


def folders(data):
    train = list_folder(data / "train")
    return train, list_folder(data / "val", train.classes)


def by_cell(records):
    return {(r["b"], r["t"], r["pool"]): (r["linear"], r["lr"]) for r in records}


def grid_of(trainer, number=0):
    path = trainer.folder / f"probes-0-{number}.pt"
    return torch.load(path, weights_only=True)["grid"]


def test_each_probe_is_trained_as_if_it_were_alone(make, data, tmp_path):
    records = by_cell(make(epochs=1).run(*folders(data), 0))
    assert len(records) == 2 * 2 * 2
    together = grid_of(make())
    for b, pool, lr, rate in ((24, 2, 1e-2, 1), (12, 1, 1e-3, 0)):
        alone = make((b,), (30,), (pool,), (lr,), folder=tmp_path / f"{b}", epochs=1)
        alone.run(*folders(data), 0)
        many = together[f"weights.{onepass.ProbeGrid.name((b, pool), rate)}"][0]
        one = grid_of(alone)[f"weights.{onepass.ProbeGrid.name((b, pool), 0)}"][0]
        torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-6)


def features(trainer, images, rows, tap):
    """Features (N, D) of one tap, pooled to 2x2."""
    images = RowImages(images, 32)
    x = torch.stack([images[0, row] for row in rows])
    with torch.no_grad():
        maps = trainer.backbone.forward_taps(x, tap[:1], tap[1:])[tap]
    return F.adaptive_avg_pool2d(maps, 2).flatten(1)


@pytest.mark.parametrize("standardize", [False, True])
def test_a_step_is_adams_on_the_cross_entropy(make, data, standardize):
    """The first copy learns without the held-out images, the second from all."""
    train, val = folders(data)
    trainer = make((12,), (90,), (2,), (1e-2,), epochs=1, standardize=standardize)
    trainer.run(train, val, 0)
    trained = grid_of(trainer)
    plain = features(trainer, train, range(len(train)), (90, 12))
    flips = onepass.RandomStream.FLIPS.generator(0, 0).random(len(train)) < 0.5
    rows = np.arange(len(train)) + len(train) * flips
    x = features(trainer, train, rows, (90, 12))
    if standardize:
        x = (x - plain.mean(0)) / plain.std(0, correction=0)
    labels = torch.from_numpy(train.labels)
    learn, _ = onepass.split_holdout(train.labels, onepass.HOLDOUT, 0)
    for copy, own in enumerate((learn, slice(None))):
        start = onepass.ProbeGrid({(12, 2): x.shape[1]}, 1, 1, 3, 0)
        weight = torch.nn.Parameter(start.weights["b12_p2_0"][0].detach().clone())
        optimizer = torch.optim.Adam([weight], lr=1e-2)
        F.cross_entropy(x[own] @ weight.T, labels[own]).backward()
        optimizer.step()
        found = trained[f"weights.b12_p2_{copy}"][0]
        torch.testing.assert_close(found, weight.data, rtol=1e-3, atol=1e-5)


def test_the_network_runs_once_for_many_probes(make, tmp_path):
    blocks, timesteps, rates = (12, 15, 18, 21, 24, 27), (10, 90), (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    trainer = make(blocks, timesteps, (1,), rates, epochs=1)
    image_folders.write_folder(tmp_path / "images", 2, 0)
    train = val = list_folder(tmp_path / "images")
    with counting_flops() as counter:
        trainer.run(train, val, 0)
    images = len(train) + len(val)  # learning and held-out ones are together the training set
    flops = sweep.flops_to(trainer.backbone, blocks, 32)
    apart = len(timesteps) * len(rates) * images * sum(flops.values())
    assert counter.get_total_flops() < apart / 10
    assert counter.get_total_flops() > 0.9 * len(timesteps) * images * max(flops.values())


def test_memory_is_bounded(make, data, capsys):
    few = folders(data)[1]
    whole = make((12,), (90,), epochs=1)
    expected = by_cell(whole.run(few, few, 0))
    size = max(onepass.BYTES * 4 * 3 * (n + 1) for n in whole.plan(3)[0].values())
    folder = whole.folder.parent / "parts"
    parts = make((12,), (90,), epochs=1, probe_memory=(size + 1) / 1e9, folder=folder)
    assert by_cell(parts.run(few, few, 0)) == expected
    assert "in 2 part(s)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--probe-memory"):
        make((12,), (90,), probe_memory=(size - 1) / 1e9).run(few, few, 0)


def test_a_killed_run_continues(make, data):
    train, val = folders(data)
    whole = make((12,), (90,), (2,), epochs=2)
    expected = by_cell(whole.run(train, val, 0))
    folder = whole.folder.parent / "killed"
    make((12,), (90,), (2,), epochs=1, folder=folder).run(train, val, 0)
    resumed = make((12,), (90,), (2,), epochs=2, folder=folder)
    assert by_cell(resumed.run(train, val, 0)) == expected
    for name, value in grid_of(whole).items():
        assert value.equal(grid_of(resumed)[name])


def test_sweep_in_one_and_two_processes(data, weights, tmp_path):
    command = [
        "tools/sweep.py", "--data", data, "--unet", "tiny", "--checkpoint", weights, "--image-size",
        32, "--blocks", 12, 24, "--timesteps", 30, 90, "--pools", 1, 2, "--device", "cpu",
        "--workers", 0, "--batch-size", 8, "--probe", "one-pass", "--epochs", 1, "--out",
    ]  # fmt: skip
    scripts = [
        forked.Script([*command, tmp_path / out], tmp_path / f"{number}.log", env)
        for number, (out, env) in enumerate((("one", {}), *(("two", e) for e in forked.ranks(2))))
    ]
    try:
        for script in scripts:
            script.finish(300)
    finally:
        for script in scripts:
            script.kill()
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert by_cell(one["records"]) == by_cell(two["records"])
    assert len(one["records"]) == 8
    assert "linear" in one["cells"][0]
    assert "knn" not in one["cells"][0]
    assert (tmp_path / "one/linear_pool2.png").is_file()
    assert not (tmp_path / "one/cache").exists()


def test_large_sets_take_one_pass(weights, data, tmp_path, monkeypatch):
    config = sweep.SweepConfig(
        unet="tiny", checkpoint=weights, data=data, blocks=(12, 24), timesteps=(30, 90),
        pools=(1,), image_size=32, device="cpu", out=tmp_path,
    )  # fmt: skip
    blocks = UNetConfig.from_preset("tiny").blocks
    size = 54 * 2 * 2 * sum(blocks[b].channels for b in (12, 24))
    for limit, expected in ((size, False), (size - 1, True)):
        monkeypatch.setattr(sweep, "LARGEST_CACHE", limit)
        assert sweep.Sweep(config).one_pass == expected
    for changes in ({"probe": "cached"}, {"measures": ("knn",)}, {"cka_only": True}):
        assert not sweep.Sweep(dataclasses.replace(config, **changes)).one_pass


def test_held_out_images_choose_the_rate_of_each_tap(make, data, monkeypatch):
    train, val = folders(data)
    trainer = make((12,), (30, 90), (1,), (1e-3, 1e-2), epochs=1)
    losses, accuracies = (  # two rates without the held-out images, then with them
        torch.tensor([[[2.0, 0.6], [0.5, 1.1], [0.0, 1.0], [1.0, 0.0]]]),
        torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.9, 0.4], [0.3, 0.8]]]),
    )
    found = {len(train): (losses, 0 * losses), len(val): (0 * losses, accuracies)}
    monkeypatch.setattr(trainer, "_evaluate", lambda grid, images, rows: found[len(images)])
    found = by_cell(trainer.run(train, val, 0))
    assert found == {
        (12, 30, 1): (pytest.approx(0.3), 1e-2),
        (12, 90, 1): (pytest.approx(0.4), 1e-3),
    }


def test_losses_and_accuracies(make, data):
    _, val = folders(data)
    trainer = make((24,), (90,), (2,), (1e-2,))
    x = features(trainer, val, range(len(val)), (90, 24))
    grid = onepass.ProbeGrid({(24, 2): x.shape[1]}, 1, 2, 3, 0)
    losses, accuracies = trainer._evaluate(grid, val, np.arange(len(val)))
    scores = x @ grid.weights["b24_p2_0"][0].T
    labels = torch.from_numpy(val.labels)
    expected = F.cross_entropy(scores, labels).item()
    assert losses.flatten().tolist() == pytest.approx([expected] * 2, rel=1e-5)
    expected = (scores.argmax(1) == labels).float().mean().item()
    assert accuracies.flatten().tolist() == pytest.approx([expected] * 2)


def test_constant_features_keep_their_scale(make, data, monkeypatch):
    trainer = make((12,), (90,), (1,), (1e-2,))
    x = torch.randn(1, 36, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    x[..., 1] = 0.1
    train = folders(data)[0]
    batch = {(12, 1): x}, torch.arange(36), torch.arange(36)
    monkeypatch.setattr(trainer, "_batches", lambda *args: [batch])
    grid = onepass.ProbeGrid({(12, 1): 3}, 1, 1, 3, 0)
    trainer._measure(grid, train, 0)
    scaled = (x - grid.means["b12_p1"]) * grid.scales["b12_p1"]
    assert scaled.mean(1).abs().max() < 1e-6
    deviations = scaled.std(1, correction=0).flatten()
    torch.testing.assert_close(deviations, torch.tensor([1.0, 0.0, 1.0]), rtol=1e-5, atol=1e-6)


def test_probes_reach_the_accuracy_of_cached_ones(make, data):
    """Enough steps of Adam end near the minimum that scikit-learn finds."""
    train, val = folders(data)
    trainer = make((24,), (90,), (2,), (1e-3, 1e-2), epochs=12, flip=False, probe_batch=8)
    (found,) = trainer.run(train, val, 0)
    taps = [features(trainer, part, range(len(part)), (90, 24)) for part in (train, val)]
    expected = linear_accuracy(taps[0], train.labels, taps[1], val.labels, [1e-3])
    assert found["linear"] == pytest.approx(expected["top1"], abs=0.12)
    assert found["linear"] > 0.6


def test_the_rate_drops_every_seven_epochs(make, data, monkeypatch):
    few, rates, step = folders(data)[1], [], torch.optim.Adam.step

    def spy(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    make((12,), (90,), (1,), epochs=8).run(few, few, 0)
    assert rates[:7] == [[1e-3, 1e-2] * 2] * 7
    assert rates[7:] == [pytest.approx([1e-4, 1e-3] * 2)]
