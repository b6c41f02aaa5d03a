"""What features are judged by: linear probes, centered kernel alignment, principal components.

Everything is computed in float64 and draws nothing, so equal features give equal numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ITERATIONS = 2000
"""Of L-BFGS; a probe usually takes 30 to 300."""
TOLERANCE = 1e-5
"""A probe is done where no derivative of its loss (a mean over images) is larger."""


# ------------------------------------------------------------------------------------ linear probe


def standardise(train: Tensor, others: Sequence[Tensor] = ()) -> list[Tensor]:
    """Bring features to mean 0 and a common scale, by the training images alone.

    Each feature is divided by its own standard deviation, and all by the root of their number: the
    mean square of a training vector's length is then 1 whatever the number of features, so that one
    strength of regularisation means the same for a short vector and a long one. Features that
    are constant over the training images become 0.

    Args:
        train: (N, D).
        others: (M, D) each.

    Returns:
        All of them, float64, the training features first.
    """
    x = train.double()
    mean = x.mean(0)
    scale = (x - mean).square().mean(0).sqrt()
    constant = scale <= 1e-9 * x.abs().amax(0)
    factor = torch.where(constant, 0.0, 1 / torch.where(constant, 1.0, scale))
    factor /= max(1, int((~constant).sum())) ** 0.5
    return [(y.double() - mean) * factor for y in (x, *others)]


def rotate(train: Tensor, others: Sequence[Tensor] = ()) -> tuple[list[Tensor], Tensor]:
    """Coordinates along the principal axes of the training features, without a loss.

    The solution of a regularised linear probe lies in the span of the training vectors, so a
    rotation into it changes neither the problem nor the scores, and leaves min(N, D) numbers a
    vector. For D > N the axes come from the N x N products.

    Args:
        train: (N, D) float64.
        others: (M, D) each.

    Returns:
        The coordinates (N, R) and (M, R), and the mean square (R,) along each axis.
    """
    count, width = train.shape
    wide = width > count
    squares, axes = torch.linalg.eigh(train @ train.T if wide else train.T @ train)
    kept = squares > squares[-1].clamp_min(1e-300) * 1e-12
    squares, axes = squares[kept], axes[:, kept]
    if wide:
        axes = train.T @ (axes / squares.sqrt())
    return [x @ axes for x in (train, *others)], squares / count


@dataclass(frozen=True)
class Probe:
    """A linear classifier of features.

    Attributes:
        weight: (D, K).
        bias: (K,).
        gradient: Largest derivative of the loss that is left.
        iterations: How many L-BFGS took.
    """

    weight: Tensor
    bias: Tensor
    gradient: float
    iterations: int

    def __call__(self, features: Tensor) -> Tensor:
        """Scores (N, K) of features (N, D)."""
        return features @ self.weight + self.bias


def fit_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    l2: float,
    start: Probe | None = None,
    squares: Tensor | None = None,
) -> Probe:
    """Multinomial logistic regression over the whole batch: the one minimum there is.

    The loss is the mean cross-entropy plus ``l2 / 2`` times the squared weights (the biases are
    free); scikit-learn's ``C`` is ``1 / (l2 N)``. It is strictly convex in the weights, so the
    result depends neither on a seed nor on a schedule. L-BFGS with a strong Wolfe line search
    works on weights scaled by a bound of the curvature, which along principal axes is
    ``squares / 2 + l2``.

    Args:
        features: (N, D) float64.
        labels: (N,).
        classes: K.
        l2: Strength of the regularisation, above 0.
        start: Where to start; the result does not depend on it.
        squares: Mean square (D,) along each axis, from :func:`rotate`; None leaves the weights
            unscaled. The result does not depend on it either.
    """
    width = features.shape[1]
    curvature = squares / 2 + l2 if squares is not None else features.new_ones(width)
    scale = curvature.rsqrt()[:, None]
    # one matrix for weights and biases, as L-BFGS sees it
    inputs = torch.cat([features * scale.T, features.new_ones(len(features), 1)], 1)
    penalty = torch.cat([l2 * scale.square(), features.new_zeros(1, 1)])
    targets = F.one_hot(labels, classes).to(features)
    w = features.new_zeros(width + 1, classes)
    if start is not None:
        w = torch.cat([start.weight / scale, start.bias[None]])
    w.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def loss() -> Tensor:
        logs = F.log_softmax(inputs @ w, dim=1)
        w.grad = inputs.T @ ((logs.exp() - targets) / len(inputs)) + penalty * w
        fit = -(logs * targets).sum() / len(inputs)
        return fit + (penalty * w.square()).sum() / 2

    optimizer.step(loss)
    loss()
    state = next(iter(optimizer.state.values()))
    found = w.detach()
    return Probe(
        found[:-1] * scale, found[-1].clone(), float(w.grad.abs().max()), int(state["n_iter"])
    )


# ----------------------------------------------------------------------- centered kernel alignment


def unbiased_hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - the literature's name
    """The unbiased estimator of the Hilbert-Schmidt independence criterion.

    Song et al. 2012, Eq. 5, as Nguyen et al. 2021, Eq. 3, write it::

        (tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2 1'K~L~1 / (n-2)) / (n(n-3))

    where K~ and L~ are K and L without their diagonals. Its mean over random samples of any
    size from 4 is the same, which that of the usual (biased) estimator is not.

    Args:
        k: Products of one set of features (n, n), symmetric.
        l: Those of another one for the same images.

    Raises:
        ValueError: Fewer than 4 images.
    """
    count = len(k)
    _check_count(count)
    off = 1 - torch.eye(count, dtype=k.dtype, device=k.device)
    k, l = k * off, l * off  # noqa: E741
    rows = k.sum(0), l.sum(0)
    joint = (k * l).sum() + rows[0].sum() * rows[1].sum() / ((count - 1) * (count - 2))
    return (joint - 2 * rows[0] @ rows[1] / (count - 2)) / (count * (count - 3))


def _check_count(count: int) -> None:
    if count < 4:
        raise ValueError(f"unbiased HSIC needs at least 4 images in a batch, got {count}")


def _centred(products: Tensor) -> Tensor:
    """Products such that the mean of P Q / (n(n-3)) is the unbiased HSIC: rows sum to 0."""
    count = len(products)
    p = products.clone()
    p.fill_diagonal_(0)
    rows = p.sum(0) / (count - 2)
    p += rows.sum() / (count - 1) - rows[:, None] - rows
    p.fill_diagonal_(0)
    return p


class MinibatchCKA:
    """Linear CKA between all pairs of several sets of features, batch by batch.

    Nguyen et al. 2021, Eq. 2: the unbiased HSIC of every pair is summed over the batches, and
    divided by the root of the product of the two sums of a set with itself. One batch of all
    images gives the full-batch figure.

    Args:
        count: Number of sets.
    """

    def __init__(self, count: int) -> None:
        self.sums = torch.zeros(count, count, dtype=torch.float64)

    def add(self, batch: Sequence[Tensor]) -> None:
        """Add a batch: (n, D_i) of each set, of the same n images, at least 4.

        Raises:
            ValueError: Fewer than 4 images, or another number of sets.
        """
        if len(batch) != len(self.sums):
            raise ValueError(f"{len(self.sums)} sets of features expected, got {len(batch)}")
        count = len(batch[0])
        _check_count(count)
        products = []
        for x in batch:
            x = x.double().flatten(1)
            # centring changes no HSIC, but keeps digits where a mean is large
            x = x - x.mean(0)
            products.append(_centred(x @ x.T).flatten())
        flat = torch.stack(products)
        self.sums += (flat @ flat.T).cpu() / (count * (count - 3))

    def result(self) -> Tensor:
        """CKA (count, count); NaN where a set of features is constant.

        1 for features that are equal up to rotation and scale, about 0 for independent ones; the
        estimate may lie a little outside of 0 to 1.
        """
        own = self.sums.diagonal().clamp_min(0).sqrt()
        cka = self.sums / (own[:, None] * own)
        cka[own == 0] = float("nan")
        cka[:, own == 0] = float("nan")
        return cka


# ----------------------------------------------------------------------------- principal components


def principal_components(
    features: Iterable[Tensor], count: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and first principal axes of several maps together, each position being a sample.

    An axis points to where its largest entry (in size) is positive, so that colours don't flip
    from run to run.

    Args:
        features: (C, h_i, w_i) each, of any sizes.
        count: How many axes; those beyond the rank of the features are 0.

    Returns:
        Mean (C,), axes (count, C) of length 1, and the share (count,) of the variance that each
        has; all float64.
    """
    rows = torch.cat([x.double().flatten(1).T for x in features])
    mean = rows.mean(0)
    rows = rows - mean
    width = rows.shape[1]
    wide = width > len(rows)
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = values.flip(0), vectors.flip(1)
    axes = rows.new_zeros(count, width)
    shares = rows.new_zeros(count)
    total = values.clamp_min(0).sum()
    # sums of squares below this are rounding, not structure
    floor = 1e-12 * (values[0].clamp_min(0) + 1e-12 * len(rows) * mean.square().sum())
    for i in range(min(count, len(values))):
        if values[i] <= floor:
            break
        axis = rows.T @ vectors[:, i] if wide else vectors[:, i]
        axis = axis / axis.norm()
        axes[i] = axis * torch.sign(axis[axis.abs().argmax()])
        shares[i] = values[i] / total
    return mean, axes, shares
