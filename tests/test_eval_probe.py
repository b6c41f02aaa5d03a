"""Linear probes, CKA and figures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")

from diffbackbone.eval.cka import MinibatchCKA
from diffbackbone.eval.data import split_folds, split_holdout
from diffbackbone.eval.plots import BEST_COLOR, draw_confusion, draw_heatmap, draw_taps
from diffbackbone.eval.probe import Labels, linear_accuracy, standardize


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.manual_seed(seed))


def definition(x, y):
    """HSIC as the mean over all ordered tuples of four different images: the U-statistic."""
    k, l = (z.double() @ z.double().T for z in (x, y))  # noqa: E741
    tuples = list(itertools.permutations(range(len(x)), 4))
    return sum(
        k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in tuples
    ) / len(tuples)  # fmt: skip


def cka(*sets, batches=1):
    found = MinibatchCKA(len(sets))
    for rows in np.array_split(np.arange(len(sets[0])), batches):
        found.add([x[rows] for x in sets])
    return found


def test_cka_is_the_exact_formula():
    sets = normal(0, 14, 5), normal(1, 14, 9) + 3
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for rows in (slice(0, 7), slice(7, 14)):
        for i, j in np.ndindex(2, 2):
            expected[i, j] += definition(sets[i][rows], sets[j][rows])
    found = cka(*sets, batches=2)
    assert torch.allclose(found.sums, expected, rtol=1e-9)
    own = expected.diagonal().sqrt()
    assert torch.allclose(found.result(), expected / own / own[:, None], rtol=1e-9)


def test_cka_knows_rotation_and_scale_from_chance():
    x = normal(0, 400, 30)
    rotation = torch.linalg.qr(normal(1, 30, 30))[0]
    found = cka(x, 7 * x @ rotation - 3, normal(2, 400, 500), torch.ones(400, 3), batches=4)
    found = found.result()
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-6)
    assert float(found[0, 2]) == pytest.approx(0, abs=0.05)
    assert float(found[0, 2]) == float(found[2, 0])
    assert found[3].isnan().all()


def problem(count=60, width=12, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centers = rng.normal(size=(classes, width))
    x = centers[labels] + 1.2 * rng.normal(size=(count, width)) * (1 + np.arange(width))
    return torch.from_numpy(x), labels


def exact_probe(x, labels, l2, classes=4):
    """Minimize the documented loss by Newton's method, in float64."""
    x = torch.cat([torch.as_tensor(x).double(), torch.ones(len(x), 1).double()], 1)
    y = torch.as_tensor(labels)
    size = (x.shape[1], classes)

    def loss(w):
        w = w.reshape(size)
        return F.cross_entropy(x @ w, y) + l2 / 2 * w[:-1].square().sum()

    w = torch.zeros(size[0] * size[1]).double()
    for _ in range(30):
        gradient = torch.func.grad(loss)(w)
        if float(gradient.abs().max()) < 1e-10:
            break
        # a constant added to all biases changes nothing
        w = w - torch.linalg.pinv(torch.func.hessian(loss)(w)) @ gradient
    assert float(gradient.abs().max()) < 1e-9
    return w.reshape(size)


def scores(x, w):
    return torch.as_tensor(x).double() @ w[:-1] + w[-1]


@pytest.mark.parametrize(("count", "width", "classes"), [(60, 12, 4), (20, 50, 3), (40, 6, 2)])
@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_probe_is_the_minimum_of_its_loss(count, width, classes, l2):
    x, labels = problem(count, width, classes)
    queries, truth = problem(30, width, classes, seed=1)
    found = linear_accuracy(x, labels, queries, truth, [l2])
    z, others = standardize(x, [queries])
    expected = scores(others, exact_probe(z, labels, l2, classes))
    assert found["l2"] == l2
    assert found["loss"] == pytest.approx(
        float(F.cross_entropy(expected, torch.as_tensor(truth))), rel=1e-2
    )
    assert found["top1"] == pytest.approx((expected.argmax(1).numpy() == truth).mean(), abs=0.04)


@pytest.mark.parametrize("width", [8, 110])  # rotated if far wider than the training images
def test_features_are_standardized_by_the_training_images(width):
    x = 5 + normal(0, 50, width).double() * torch.arange(1, width + 1)
    x[:, 3] = 0.1
    other = normal(1, 7, width).double()
    a, b = standardize(x, [other])
    assert np.allclose(a.mean(0), 0, atol=1e-5)
    assert np.square(a).sum(1).mean() == pytest.approx(1)
    assert a.shape == (50, min(width, 50))
    kept = [i for i in range(width) if i != 3]
    train, plain = ((z - x.mean(0)) / x.std(0, correction=0) for z in (x, other))
    products = plain[:, kept] @ train[:, kept].T / (width - 1)
    np.testing.assert_allclose(b @ a.T, products, atol=1e-4)


@pytest.mark.parametrize("folds", [1, 5])
def test_regularization_is_chosen_by_held_out_images(folds):
    x, y = problem(80, 20, seed=5)
    queries, truth = problem(30, 20, seed=6)
    splits = [split_holdout(y, 0.25, 0)] if folds == 1 else split_folds(y, folds, 0)
    strengths = [1e-4, 1e-1, 1e-2]
    found = linear_accuracy(x, y, queries, truth, strengths, splits)
    (z,) = standardize(x)
    losses = dict.fromkeys(strengths, 0.0)
    for (learn, held), l2 in itertools.product(splits, strengths):
        logits = scores(z[held], exact_probe(z[learn], y[learn], l2))
        losses[l2] += float(F.cross_entropy(logits, torch.as_tensor(y[held])))
    assert found["l2"] == min(losses, key=losses.get)
    alone = linear_accuracy(x, y, queries, truth, [found["l2"]])
    assert alone["loss"] == pytest.approx(found["loss"], rel=1e-3)
    other = linear_accuracy(x, y, queries, truth[::-1].copy(), strengths, splits)
    assert other["l2"] == found["l2"]  # the validation labels have no say
    assert other["top1"] != found["top1"]
    assert linear_accuracy(x, y, queries, truth, [1e-5, 2e-3, 1])["l2"] == 2e-3  # no images


@pytest.mark.parametrize(
    ("counts", "folds"),
    [
        ([9, 3, 50], 3),  # each class is to be learned from each time, and chosen by
        ([2, 2], 2),
        ([400, 599], 5),
        ([500, 500], 1),  # enough for one share
        ([5, 1], 0),
    ],
)
def test_folds_follow_the_number_of_images(counts, folds):
    labels = np.repeat(np.arange(len(counts)), counts)
    draw = Labels.draw(0, np.arange(len(labels)), labels)
    assert len(draw.splits) == folds
    for learn, held in draw.splits:
        assert set(labels[learn]) == set(labels[held]) == set(range(len(counts)))
        assert not set(learn) & set(held)
        assert folds != 1 or len(held) == 0.2 * len(labels)


def test_heatmap_shows_values_where_they_belong():
    values = np.array([[0.1, 0.5, 0.9], [0.3, np.nan, 0.7]])
    marks = {(0, 2): (BEST_COLOR, "best")}
    names = "accuracy", "block b", "timestep t"
    figure = draw_heatmap(values, [19, 24], [10, 90, 300], *names, (0, 1), marks=marks)
    axes = figure.axes[0]
    (picture,) = axes.images
    np.testing.assert_array_equal(np.ma.filled(picture.get_array(), np.nan), values)
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (j, i): f"{values[i, j]:.2f}" for i, j in np.argwhere(~np.isnan(values))
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["19", "24"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "90", "300"]
    (frame,) = axes.patches
    assert (round(frame.get_x()), round(frame.get_y())) == (2, 0)


@pytest.mark.parametrize("classes", [3, 100])
def test_confusion_matrix(classes):
    counts = np.diag(np.arange(classes))
    counts[0, 2] = 5
    axes = draw_confusion(counts, [f"class {i}" for i in range(classes)]).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), counts)
    assert f"{classes * (classes - 1) // 2} of" in axes.get_title()
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts.get((2, 0)) == ("5" if classes == 3 else None)


def test_taps_are_beside_their_image():
    image = np.zeros((40, 64, 3), np.uint8)
    taps = {
        (t, b): (np.full((3, 4, 3), b, np.uint8), f"{t}, {b}") for b in (19, 24) for t in (10, 90)
    }
    figure = draw_taps([("a.png", image, taps), ("b.png", image[:, :40], taps)], {19: 16, 24: 16})
    first = figure.subfigs[0].axes
    assert len(first) == 5
    for (key, (pixels, caption)), axes in zip(taps.items(), first[1:]):
        assert axes.get_xlabel() == caption
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 64), (40, 0))
        assert axes.images[0].get_extent() == [0, 64, 48, 0]
        np.testing.assert_array_equal(axes.images[0].get_array(), pixels)
        assert axes.get_subplotspec().colspan.start == (10, 90).index(key[0]) + 1
