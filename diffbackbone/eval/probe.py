"""Linear probes: logistic regression on standardized features, solved to its minimum.

The result depends neither on a learning rate nor on a seed. The same strengths of regularization
are tried for all features; held-out training images choose one, and the probe is then fitted to
all training images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from diffbackbone.eval.data import split_folds, split_holdout
from diffbackbone.eval.features import FeatureCache, Tap, pool_maps
from diffbackbone.eval.knn import knn_accuracy

FALLBACK_L2 = 1e-3
"""Taken where no training image can be held out to choose by: a class has a single one."""
FEW = 1000
"""Below so many labeled images one held-out share would choose by chance; folds are used."""
MEASURES = {"linear": "linear probe", "knn": "kNN"}


@dataclass(frozen=True)
class Labels:
    """The labeled images of one seed.

    Attributes:
        seed: The seed.
        rows: Rows of the training features that have a label (N,).
        splits: Indices into ``rows`` to fit to and to choose the regularization by, once or for
            each fold; empty where none can be held out.
    """

    seed: int
    rows: np.ndarray
    splits: Sequence[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def draw(cls, seed: int, rows: np.ndarray, labels: np.ndarray, share: float) -> Labels:
        """Hold out a share; of fewer than :data:`FEW` images, one share after the other."""
        counts = np.bincount(labels)
        if counts[counts > 0].min() < 2:
            return cls(seed, rows, ())
        if len(labels) < FEW:
            return cls(seed, rows, split_folds(labels, max(2, round(1 / share)), seed))
        return cls(seed, rows, [split_holdout(labels, share, seed)])


def standardize(train: Tensor, others: Sequence[Tensor] = ()) -> list[np.ndarray]:
    """Standardize features by the training images, to vectors with a mean square length of 1.

    One strength of regularization then means the same for few features and for many. Where there
    are far more features than images, the vectors are rotated into the training vectors' span,
    which changes no score of a regularized linear classifier and makes fitting fast.

    Args:
        train: (N, D).
        others: (M, D) each.

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
    splits: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> dict[str, float]:
    """Compute the top-1 accuracy of a linear probe.

    The loss is the mean cross-entropy plus ``l2 / 2`` times the squared weights; the strength with
    the smallest held-out loss over all splits is taken.

    Args:
        train: (N, D).
        train_labels: (N,), of at least two classes.
        val: (M, D).
        val_labels: (M,).
        strengths: Values of l2.
        splits: Training images to fit to and to choose by, of each fold. Without, the strength next
            to :data:`FALLBACK_L2` is taken.

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


@dataclass
class ProbeEvaluator:
    """Measures taps of two caches by linear probes and nearest neighbors.

    Attributes:
        train: Training features.
        val: Validation features.
        draws: The labeled images of each seed.
        measures: Names from :data:`MEASURES`.
        l2: Strengths of regularization.
        k: Number of neighbors.
        temperature: Temperature of the neighbors' votes.
        device: Where to find neighbors.
    """

    train: FeatureCache
    val: FeatureCache
    draws: Sequence[Labels]
    measures: Sequence[str] = tuple(MEASURES)
    l2: Sequence[float] = (1e-2, 1e-3, 1e-4, 1e-5)
    k: int = 20
    temperature: float = 0.07
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def measure(self, tap: Tap, wanted: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
        """Measure one tap.

        Args:
            tap: Timestep and block.
            wanted: Pools and seeds.

        Returns:
            A record each: ``b``, ``t``, ``pool``, ``seed``, ``features`` (their number),
            ``train_images``, and ``linear``, ``l2``, ``loss``, ``knn`` as far as measured.
        """
        maps = [
            cache.read(range(len(cache.listing)), [tap])[tap] for cache in (self.train, self.val)
        ]
        draws = {draw.seed: draw for draw in self.draws}
        known: dict[tuple[Any, ...], dict[str, float]] = {}
        records = []
        for pool, seed in wanted:
            draw, size = draws[seed], min(pool, max(maps[0].shape[-2:]))
            x, queries = (pool_maps(m, size).flatten(1) for m in (maps[0][draw.rows], maps[1]))
            # maps no larger than several pools, and draws that are equal, are measured once
            split = tuple(held.tobytes() for _, held in draw.splits)
            record = {"b": tap[1], "t": tap[0], "pool": pool, "seed": seed}
            record.update(features=x.shape[1], train_images=len(x))
            for measure in self.measures:
                key = (measure, size, draw.rows.tobytes(), split if measure == "linear" else ())
                if key not in known:
                    known[key] = getattr(self, f"_{measure}")(x, queries, draw)
                record.update(known[key])
            records.append(record)
        return records

    def _linear(self, x: Tensor, queries: Tensor, draw: Labels) -> dict[str, float]:
        labels = self.train.labels[draw.rows]
        found = linear_accuracy(x, labels, queries, self.val.labels, self.l2, draw.splits)
        return {"linear": found.pop("top1"), **found}

    def _knn(self, x: Tensor, queries: Tensor, draw: Labels) -> dict[str, float]:
        found = knn_accuracy(
            lambda start, end: x[start:end],
            self.train.labels[draw.rows],
            lambda start, end: queries[start:end],
            self.val.labels,
            [self.k],
            len(self.train.listing.classes),
            temperature=self.temperature,
            device=self.device,
        )
        return {"knn": found[self.k]["top1"]}
