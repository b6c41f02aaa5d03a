"""Linear probes, CKA, principal components and heat maps: what `tools/sweep.py` is made of."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import _analysis
import _classification as common


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------- kernels and alignment


def products(seed, count=8, width=3):
    x = torch.randn(count, width, dtype=torch.float64, generator=torch.manual_seed(seed))
    return x @ x.T


def definition(k, l):  # noqa: E741
    """HSIC as the mean over all ordered tuples of four different images: the U-statistic."""
    tuples = list(itertools.permutations(range(len(k)), 4))
    return sum(
        k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in tuples
    ) / len(tuples)  # fmt: skip


def biased(k, l):  # noqa: E741
    """The usual estimator, tr(KHLH) / (n-1)^2."""
    n = len(k)
    h = torch.eye(n, dtype=k.dtype) - 1 / n
    return (k @ h @ l @ h).trace() / (n - 1) ** 2


def test_unbiased_hsic_is_the_mean_over_all_tuples():
    k, l = products(0), products(1)  # noqa: E741
    assert float(_analysis.unbiased_hsic(k, l)) == pytest.approx(float(definition(k, l)), rel=1e-12)
    assert float(_analysis.unbiased_hsic(k, k)) == pytest.approx(float(definition(k, k)), rel=1e-12)
    with pytest.raises(ValueError, match="at least 4 images in a batch, got 3"):
        _analysis.unbiased_hsic(products(0, 3), products(1, 3))


@pytest.mark.parametrize("size", [4, 5, 7])
def test_expectation_over_minibatches_is_the_full_batch(size):
    k, l = products(2), products(3)  # noqa: E741
    batches = [list(chosen) for chosen in itertools.combinations(range(8), size)]

    def mean(hsic):
        return float(sum(hsic(k[b][:, b], l[b][:, b]) for b in batches) / len(batches))

    assert mean(_analysis.unbiased_hsic) == pytest.approx(
        float(_analysis.unbiased_hsic(k, l)), rel=1e-10
    )
    assert mean(biased) != pytest.approx(float(biased(k, l)), rel=0.05)


def cka(*sets, batches=1):
    found = _analysis.MinibatchCKA(len(sets))
    for rows in np.array_split(np.arange(len(sets[0])), batches):
        found.add([x[rows] for x in sets])
    return found.result()


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.manual_seed(seed))


def test_cka_is_the_textbooks():
    x, z = normal(0, 40, 5), normal(1, 40, 9)
    y = x @ normal(2, 5, 4) + 0.5 * normal(3, 40, 4)
    found = cka(x, y, z, batches=3)
    sums = torch.zeros(3, 3, dtype=torch.float64)
    for rows in np.array_split(np.arange(40), 3):
        kernels = [s[rows].double() @ s[rows].double().T for s in (x, y, z)]
        for i, j in np.ndindex(3, 3):
            sums[i, j] += _analysis.unbiased_hsic(kernels[i], kernels[j])
    for i, j in np.ndindex(3, 3):
        expected = sums[i, j] / (sums[i, i] * sums[j, j]).sqrt()
        assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-10)


def test_cka_of_many_images_is_that_of_the_feature_space():
    """For many images and few features the biased form |Y'X|^2 / (|X'X| |Y'Y|) comes close."""
    x = normal(0, 4000, 3).double() + 2
    y = (x @ normal(1, 3, 4).double()) + 0.3 * normal(2, 4000, 4)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert float(cka(x, y)[0, 1]) == pytest.approx(float(expected), abs=5e-3)
    assert float(cka(x, y, batches=40)[0, 1]) == pytest.approx(float(expected), abs=2e-2)


@pytest.mark.parametrize("batches", [1, 4])
def test_cka_knows_rotation_and_scale_from_chance(batches):
    x = normal(0, 400, 30)
    rotation = torch.linalg.qr(normal(1, 30, 30))[0]
    other = normal(2, 400, 500)
    found = cka(x, 7 * x @ rotation - 3, other, batches=batches)
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-6)
    assert float(found[0, 2]) == pytest.approx(0, abs=0.05)
    assert float(found[0, 2]) == float(found[2, 0])
    kernels = [s @ s.T for s in (x[:100].double(), other[:100].double())]
    bias = (
        biased(*kernels) / (biased(kernels[0], kernels[0]) * biased(kernels[1], kernels[1])) ** 0.5
    )
    assert float(bias) > 0.4  # what the unbiased estimator spares us


def test_cka_of_large_means_and_constants():
    x, y = normal(0, 60, 4), normal(1, 60, 4)
    plain, far = cka(x, y), cka(x + 1000, y - 1000)
    assert float(far[0, 1]) == pytest.approx(float(plain[0, 1]), abs=1e-3)
    found = cka(x, torch.ones(60, 3))
    assert torch.isnan(found[1]).all()
    assert torch.isnan(found[:, 1]).all()
    assert float(found[0, 0]) == pytest.approx(1)
    with pytest.raises(ValueError, match="2 sets of features expected, got 1"):
        _analysis.MinibatchCKA(2).add([x])
    with pytest.raises(ValueError, match="at least 4"):
        _analysis.MinibatchCKA(1).add([x[:3]])


# --------------------------------------------------------------------------------- linear probe


def problem(count=60, width=12, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = rng.normal(size=(classes, width))
    x = centres[labels] + 1.2 * rng.normal(size=(count, width)) * (1 + np.arange(width))
    return torch.from_numpy(x), torch.from_numpy(labels)


def loss_of(x, y, weight, bias, l2):
    return F.cross_entropy(x @ weight + bias, y) + l2 / 2 * weight.square().sum()


@pytest.mark.parametrize(("count", "width"), [(60, 12), (30, 50)])
@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_probe_is_at_the_minimum(count, width, l2):
    x, y = problem(count, width)
    (x,) = _analysis.standardise(x)
    probe = _analysis.fit_probe(x, y, 4, l2)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    loss = loss_of(x, y, weight, bias, l2)
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) <= 1.01 * _analysis.TOLERANCE
    assert probe.gradient <= _analysis.TOLERANCE
    for seed in range(3):  # uphill on every side
        step = 0.01 * normal(seed, *weight.shape).double()
        assert (loss_of(x, y, weight + step, bias, l2) > loss).item()


@pytest.mark.parametrize(("count", "width"), [(60, 12), (30, 50)])
def test_probe_equals_scikit_learns(count, width):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = problem(count, width)
    (x,) = _analysis.standardise(x)
    for l2 in (1e-1, 1e-3):
        other = linear_model.LogisticRegression(C=1 / (l2 * count), tol=1e-10, max_iter=10_000)
        other.fit(x.numpy(), y.numpy())
        probe = _analysis.fit_probe(x, y, 4, l2)
        logs = F.log_softmax(probe(x), 1)
        expected = torch.from_numpy(other.predict_log_proba(x.numpy()))
        assert torch.allclose(logs, expected, atol=2e-3)
        assert torch.allclose(probe.weight, torch.from_numpy(other.coef_.T.copy()), atol=5e-3)


@pytest.mark.parametrize(("count", "width"), [(60, 12), (30, 50)])
def test_rotation_start_and_scaling_change_no_score(count, width):
    x, y = problem(count, width)
    queries = problem(20, width, seed=1)[0]
    x, queries = _analysis.standardise(x, [queries])
    plain = _analysis.fit_probe(x, y, 4, 1e-3)
    (z, rotated), squares = _analysis.rotate(x, [queries])
    assert z.shape[1] <= min(count, width)
    assert torch.allclose(z @ z.T, x @ x.T, atol=1e-10)
    assert torch.allclose(rotated @ z.T, queries @ x.T, atol=1e-10)
    assert torch.allclose(z.square().mean(0), squares, atol=1e-10)
    start = _analysis.fit_probe(z, y, 4, 1e-1, None, squares)
    warm = _analysis.fit_probe(z, y, 4, 1e-3, start, squares)
    for probe in (warm, _analysis.fit_probe(z, y, 4, 1e-3)):
        assert torch.allclose(probe(rotated), plain(queries), atol=1e-2)
    assert warm.iterations < _analysis.MAX_ITERATIONS


def test_features_are_standardised_by_the_training_images():
    x = 5 + normal(0, 50, 8).double() * torch.arange(1, 9)
    x[:, 3] = 0.1
    x[::2, 3] = float(np.nextafter(0.1, 1))  # constant but for rounding
    other = normal(1, 7, 8).double()
    a, b = _analysis.standardise(x, [other])
    assert torch.allclose(a.mean(0), torch.zeros(8).double(), atol=1e-12)
    assert float(a.square().sum(1).mean()) == pytest.approx(1)
    assert not a[:, 3].any()
    assert not b[:, 3].any()
    kept = [0, 1, 2, 4, 5, 6, 7]
    expected = (other - x.mean(0)) / x.std(0, correction=0) / 7**0.5
    assert torch.allclose(b[:, kept], expected[:, kept].double(), atol=1e-5)


# -------------------------------------------------------------------------- principal components


@pytest.mark.parametrize(("channels", "sizes"), [(5, ((8, 9), (7, 4))), (40, ((3, 4), (2, 5)))])
def test_principal_components_are_those_of_the_svd(channels, sizes):
    scale = torch.arange(1, channels + 1)[:, None, None] ** 1.5
    maps = [normal(i, channels, *size) * scale + 3 for i, size in enumerate(sizes)]
    mean, axes, shares = _analysis.principal_components(maps)
    rows = np.concatenate([x.reshape(channels, -1).T.double().numpy() for x in maps])
    _, values, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert np.allclose(mean, rows.mean(0))
    assert np.allclose(shares, values[:3] ** 2 / (values**2).sum())
    for axis, expected in zip(axes.numpy(), vectors):
        assert abs(axis @ expected) == pytest.approx(1, abs=1e-9)
        assert axis[np.abs(axis).argmax()] > 0  # the sign does not hang on the solver


def test_sign_of_components_follows_the_features():
    maps = [normal(0, 6, 5, 5)]
    _, axes, _ = _analysis.principal_components(maps)
    _, flipped, _ = _analysis.principal_components([-maps[0]])
    assert torch.allclose(axes, flipped, atol=1e-9)  # -x has the same axes, and so the same signs


def test_components_beyond_the_rank_are_zero():
    line = torch.arange(12.0).reshape(1, 3, 4) * torch.tensor([2.0, -1, 0.5, 0])[:, None, None]
    for maps in ([line + 100], [torch.cat([line] * 5)]):  # more positions, more channels
        _, axes, shares = _analysis.principal_components(maps)
        assert float(shares[0]) == pytest.approx(1)
        assert not axes[1:].any()
        assert not shares[1:].any()
    _, axes, shares = _analysis.principal_components([torch.full((4, 3, 3), 0.1)])
    assert not axes.any()
    assert not shares.any()


# ------------------------------------------------------------------------------------- pictures


def luminance(pixel):
    return float(np.dot(pixel[:3], [0.299, 0.587, 0.114]))


def test_colours_order_with_values():
    shades = [luminance(common.colour_of(x, 10, 20)) for x in np.linspace(10, 20, 101)]
    assert (np.diff(shades) < 0).all()
    assert common.colour_of(3, 10, 20) == common.colour_of(10, 10, 20)
    assert common.colour_of(30, 10, 20) == common.colour_of(20, 10, 20)
    assert common.colour_of(float("nan"), 10, 20) == common.MISSING_COLOUR


def find_grid(picture):
    """Left, top, right and bottom of the area inside the frame, from its dark outline."""
    dark = (picture == 40).all(2)
    columns = np.flatnonzero(dark.sum(0) > 0.3 * dark.sum(0).max())
    rows = np.flatnonzero(dark.sum(1) > 0.6 * dark.sum(1).max())
    return columns[0] + 1, rows[0] + 1, columns[columns < columns[0] + 1400][1], rows[-1]


def test_heatmap_shows_values_where_they_belong():
    values = np.array([[0.1, 0.5, 0.9], [0.3, np.nan, 0.7]])
    marked = common.BEST_COLOUR
    picture = np.asarray(
        common.draw_heatmap(
            values,
            [19, 24],
            [10, 90, 300],
            "title",
            row_name="block b",
            column_name="timestep t",
            caption="caption",
            marks={(0, 2): marked},
            legend=[(marked, "best")],
        )
    )
    left, top, right, bottom = find_grid(picture)
    width, height = (right - left) / 3, (bottom - top) / 2
    corner = [
        [
            picture[round(top + (i + 0.85) * height), round(left + (j + 0.2) * width)]
            for j in (0, 1, 2)
        ]
        for i in (0, 1)
    ]
    shades = {values[i, j]: luminance(corner[i][j]) for i, j in ((0, 0), (1, 0), (0, 1), (1, 2))}
    assert [shades[v] for v in sorted(shades)] == sorted(shades.values(), reverse=True)
    assert tuple(corner[1][1]) == common.MISSING_COLOUR
    for i, j in ((0, 0), (0, 2), (1, 2)):
        assert tuple(corner[i][j]) == common.colour_of(values[i, j], 0.1, 0.9)
    frames = np.argwhere((picture == marked).all(2))
    inside = frames[frames[:, 0] < bottom]
    assert inside[:, 1].min() >= left + 2 * width - 1
    assert inside[:, 0].max() <= top + height
    assert (picture[round(top + 0.5 * height), round(left + 2.5 * width) - 20 :][:40] > 150).any()
    bar = picture[top + 3 : bottom - 3, right + 38]
    assert (np.diff([luminance(p) for p in bar]) >= 0).all()  # high values above


def test_heatmap_of_many_cells_and_of_one_value():
    many = common.draw_heatmap(
        np.random.default_rng(0).random((60, 70)), range(60), range(70), "t", row_name="r",
        column_name="c",
    )  # fmt: skip
    assert max(many.size) < 2600
    one = common.draw_heatmap(np.ones((1, 1)), [1], [1], "t", row_name="r", column_name="c")
    assert one.size[0] > 100
    square = np.asarray(
        common.draw_heatmap(
            np.eye(4), range(4), range(4), "t", row_name="r", column_name="c", square=True
        )
    )
    left, top, right, bottom = find_grid(square)
    assert right - left == bottom - top
