"""Linear probes: logistic regression on standardized features, solved to its minimum.

The result depends neither on a learning rate nor on a seed. The same strengths of regularization
are tried for all features; held-out training images choose one, and the probe is then fitted to
all training images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from diffbackbone.eval.data import Split, split_folds, split_holdout
from diffbackbone.eval.features import FeatureCache, Tap, pool_maps
from diffbackbone.eval.knn import knn_accuracy

FALLBACK_L2 = 1e-3
"""Used where a class has a single training image, so that none can be held out."""
FEW = 1000
"""Below this number of labeled images, cross-validation replaces one held-out share."""
STRENGTHS = (1e-2, 1e-3, 1e-4, 1e-5)
"""Strengths of regularization that are tried."""
MEASURES = {"linear": "linear probe", "knn": "kNN"}


@dataclass(frozen=True)
class Labels:
    """The labeled images of one seed.

    ``rows`` (N,) of the training features have a label; ``splits`` are indices into them to fit to
    and to choose the regularization by, none where no image can be held out.
    """

    seed: int
    rows: np.ndarray
    splits: Sequence[Split]

    @classmethod
    def draw(cls, seed: int, rows: np.ndarray, labels: np.ndarray) -> Labels:
        """Hold out a fifth; of fewer than :data:`FEW` images, one fifth after the other."""
        if np.unique(labels, return_counts=True)[1].min() < 2:
            return cls(seed, rows, ())
        if len(labels) < FEW:
            return cls(seed, rows, split_folds(labels, 5, seed))
        return cls(seed, rows, [split_holdout(labels, 0.2, seed)])


def standardize(train: Tensor, others: Sequence[Tensor] = ()) -> list[np.ndarray]:
    """Standardize features by the training images, to vectors with a mean square length of 1.

    One strength of regularization then means the same for few features and for many. Where there
    are far more features than images, the vectors are rotated into the training vectors' span,
    which changes no score of a regularized linear classifier and makes fitting fast.

    Returns:
        All of them (n, R), float32, the training features first.
    """
    scaler = StandardScaler().fit(train.float().cpu())
    width = max(1, np.count_nonzero(scaler.var_))
    scaled = [scaler.transform(x.float().cpu()) / np.float32(width**0.5) for x in (train, *others)]
    if scaled[0].shape[1] > 2 * len(scaled[0]):
        axes = torch.linalg.qr(torch.from_numpy(scaled[0].T)).Q.numpy()
        scaled = [x @ axes for x in scaled]
    return scaled


def linear_accuracy(
    train: Tensor,
    train_labels: np.ndarray,
    val: Tensor,
    val_labels: np.ndarray,
    strengths: Sequence[float],
    splits: Sequence[Split] = (),
) -> dict[str, float]:
    """Fit a linear probe to features (N, D); compute its accuracy on others (M, D).

    The loss is the mean cross-entropy plus ``l2 / 2`` times the squared weights. Of the strengths
    l2 the one with the smallest held-out loss over all splits is taken; without splits, the one
    next to :data:`FALLBACK_L2`.

    Returns:
        ``top1``, ``l2`` (the chosen one), and ``loss`` on the validation images.
    """
    x, queries = standardize(train, [val])
    classes = np.unique(train_labels)
    model = LogisticRegression(max_iter=2000, tol=1e-5, warm_start=True)

    def fit(rows: np.ndarray | slice, l2: float) -> None:
        # of two classes scikit-learn has one weight vector: half the penalty of two opposite ones
        model.C = (2 if len(classes) == 2 else 1) / (l2 * len(x[rows]))
        model.fit(x[rows], train_labels[rows])

    def loss(features: np.ndarray, labels: np.ndarray) -> float:
        known = np.isin(labels, classes)
        logs = model.predict_log_proba(features[known])
        return float(-logs[range(len(logs)), np.searchsorted(classes, labels[known])].mean())

    if splits and len(strengths) > 1:
        losses = dict.fromkeys(strengths, 0.0)
        for learn, held in splits:
            for l2 in sorted(strengths, reverse=True):
                fit(learn, l2)
                losses[l2] += len(held) * loss(x[held], train_labels[held])
        l2 = min(losses, key=losses.__getitem__)
    else:
        l2 = min(strengths, key=lambda l2: abs(math.log(l2 / FALLBACK_L2)))
    fit(slice(None), l2)
    top1 = float((model.predict(queries) == val_labels).mean())
    return {"top1": top1, "l2": l2, "loss": loss(queries, val_labels)}


def measure_tap(
    train: FeatureCache,
    val: FeatureCache,
    tap: Tap,
    pool: int,
    labels: Labels,
    measures: Sequence[str] = tuple(MEASURES),
    k: int = 20,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure one tap, pooled to ``pool`` x ``pool``, by linear probe and by kNN.

    The k neighbors are all labeled images where these are fewer; ``device`` is where to find them.

    Returns:
        ``b``, ``t``, ``pool``, ``seed``, ``features`` (their number), ``train_images``, and
        ``linear``, ``l2``, ``loss``, ``knn`` as far as measured.
    """
    x, queries = (
        pool_maps(maps, pool).flatten(1) for maps in (train.read(labels.rows, tap), val.images(tap))
    )
    truth = train.labels[labels.rows]
    record = {"b": tap[1], "t": tap[0], "pool": pool, "seed": labels.seed}
    record.update(features=x.shape[1], train_images=len(x))
    if "linear" in measures:
        found = linear_accuracy(x, truth, queries, val.labels, STRENGTHS, labels.splits)
        record.update(linear=found.pop("top1"), **found)
    if "knn" in measures:
        k = min(k, len(x))
        found = knn_accuracy(x, truth, queries, val.labels, [k], device=device)
        record["knn"] = found[k]["top1"]
    return record
