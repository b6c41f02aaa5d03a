"""Linear centered kernel alignment (CKA) over minibatches, with the unbiased HSIC estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffbackbone.eval.features import FeatureCache, Tap, pool_maps
from diffbackbone.eval.plots import draw_heatmap
from diffbackbone.utils import RandomStream, save_figure


def center(products: Tensor) -> Tensor:
    """Center a kernel matrix (n, n) so that sums of products give the unbiased HSIC.

    For centered P and Q of kernels K and L, ``(P * Q).sum() / (n (n - 3))`` is Song et al. 2012,
    Eq. 5::

        (tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2 1'K~L~1 / (n-2)) / (n(n-3))

    where K~ and L~ are K and L without their diagonals.
    """
    count = len(products)
    p = products.clone()
    p.fill_diagonal_(0)
    rows = p.sum(0) / (count - 2)
    p += rows.sum() / (count - 1) - rows[:, None] - rows
    return p.fill_diagonal_(0)


class MinibatchCKA:
    """Linear CKA between all pairs of ``count`` sets of features (Nguyen et al. 2021, Eq. 2).

    The unbiased HSIC of every pair is summed over the batches, and divided by the root of the
    product of both sets' own sums.
    """

    def __init__(self, count: int) -> None:
        self.sums = torch.zeros(count, count, dtype=torch.float64)

    def add(self, batch: Sequence[Tensor]) -> None:
        """Add a batch: features (n, ...) of each set, of the same n images; n is at least 4."""
        count = len(batch[0])
        kernels = []
        for x in batch:
            x = x.double().flatten(1)
            x = x - x.mean(0)  # changes no HSIC, but keeps digits where a mean is large
            kernels.append(center(x @ x.T).flatten())
        flat = torch.stack(kernels)
        self.sums += (flat @ flat.T).cpu() / (count * (count - 3))

    def result(self) -> Tensor:
        """Return CKA (count, count): 1 for features equal up to rotation and scale.

        It is NaN for constant features; the estimate may lie a little outside of 0 to 1.
        """
        own = self.sums.diagonal().clamp_min(0).sqrt()
        return self.sums / (own[:, None] * own)


def compare_taps(
    sets: Sequence[tuple[FeatureCache, Tap]], pool: int, limit: int, seed: int, batch: int = 256
) -> np.ndarray:
    """Compute linear CKA between all pairs of taps, of at most ``limit`` images, in batches.

    The caches hold the same images. Returns an array (len(sets), len(sets)).
    """
    order = RandomStream.ORDER.generator(seed).permutation(len(sets[0][0]))[:limit]
    cka = MinibatchCKA(len(sets))
    count = min(math.ceil(len(order) / batch), len(order) // 4)  # HSIC needs 4 images
    for rows in tqdm(np.array_split(order, count), "CKA", unit="batch", leave=False, disable=None):
        cka.add([pool_maps(cache.read(rows, tap), pool) for cache, tap in sets])
    return cka.result().numpy()


def draw_figures(
    out: Path,
    taps: Sequence[Tap],
    values: np.ndarray,
    caption: str,
    other: tuple[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Draw Figure 5: CKA between blocks by timestep, and between timesteps by block.

    ``other`` is the name of another network, and the blocks to which the columns of ``values``
    beyond the taps belong; these are drawn for each timestep.

    Returns:
        For each figure ``between``, ``at`` (the timestep or block), ``labels``, ``columns`` (the
        other network's blocks, where it is drawn), ``cka``, ``file``.
    """
    kinds = [("blocks", 0, "block b"), ("timesteps", 1, "timestep t")]
    if other is not None:
        kinds.append(("networks", 0, "block b"))
    found = []
    for between, fixed, name in kinds:
        for at in dict.fromkeys(tap[fixed] for tap in taps):
            own = [i for i, tap in enumerate(taps) if tap[fixed] == at]
            labels = [taps[i][1 - fixed] for i in own]
            record = {"between": between, "at": at, "labels": labels}
            title = f"linear CKA between {between} at {'tb'[fixed]} = {at}\n{caption}"
            columns, column_name, part = labels, name, values[np.ix_(own, own)]
            if between == "networks":
                columns, column_name, part = other[1], "other block", values[own, len(taps) :]
                record["columns"] = list(columns)
                title += f"\nColumns: {other[0]}"
            figure = draw_heatmap(part, labels, columns, title, name, column_name, limits=(0, 1))
            file = f"cka/{between}_{'tb'[fixed]}{at}.png"
            save_figure(figure, out / file)
            found.append({**record, "cka": part.tolist(), "file": file})
    return found
