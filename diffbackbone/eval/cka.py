"""Linear centered kernel alignment (CKA) over minibatches, with the unbiased HSIC estimator."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffbackbone.eval.features import FeatureCache, Tap, pool_maps
from diffbackbone.eval.plots import draw_heatmap
from diffbackbone.utils import RandomStream, save_figure, write_text


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
    """Linear CKA between all pairs of several sets of features (Nguyen et al. 2021, Eq. 2).

    The unbiased HSIC of every pair is summed over the batches, and divided by the root of the
    product of both sets' own sums. One batch of all images gives the full-batch CKA.

    Args:
        count: Number of sets.
    """

    def __init__(self, count: int) -> None:
        self.sums = torch.zeros(count, count, dtype=torch.float64)

    def add(self, batch: Sequence[Tensor]) -> None:
        """Add a batch: features (n, ...) of each set, of the same n images.

        Raises:
            ValueError: Fewer than 4 images.
        """
        count = len(batch[0])
        if count < 4:
            raise ValueError(f"unbiased HSIC needs at least 4 images in a batch, got {count}")
        kernels = []
        for x in batch:
            x = x.double().flatten(1)
            x = x - x.mean(0)  # changes no HSIC, but keeps digits where a mean is large
            kernels.append(center(x @ x.T).flatten())
        flat = torch.stack(kernels)
        self.sums += (flat @ flat.T).cpu() / (count * (count - 3))

    def result(self) -> Tensor:
        """Return CKA (count, count); NaN where a set of features is constant.

        It is 1 for features that are equal up to rotation and scale, and about 0 for independent
        ones; the estimate may lie a little outside of 0 to 1.
        """
        own = self.sums.diagonal().clamp_min(0).sqrt()
        return self.sums / (own[:, None] * own)


def compare_taps(
    cache: FeatureCache, taps: Sequence[Tap], pool: int, batch: int, limit: int, seed: int
) -> np.ndarray:
    """Compute linear CKA between all taps, over shuffled minibatches of about equal size.

    Args:
        cache: Features.
        taps: Timesteps and blocks.
        pool: Height and width that maps are pooled to.
        batch: Images of a batch at most.
        limit: Images at most.
        seed: Seed of their choice and order. (Folders are listed class by class.)

    Returns:
        (len(taps), len(taps)).
    """
    order = RandomStream.ORDER.generator(seed).permutation(len(cache.listing))[:limit]
    cka = MinibatchCKA(len(taps))
    count = min(math.ceil(len(order) / batch), len(order) // 4)  # HSIC needs 4 images
    batches = np.array_split(order, max(1, count))
    for rows in tqdm(batches, "CKA", unit="batch", leave=False, disable=None):
        cka.add([pool_maps(cache.read(rows, [tap])[tap].float(), pool) for tap in taps])
    return cka.result().numpy()


def slices(taps: Sequence[Tap], values: np.ndarray) -> Iterator[dict[str, Any]]:
    """Cut CKA of all taps into Figure 5's: blocks at each timestep, timesteps at each block.

    Yields:
        ``between``, ``at`` (the timestep or block), ``labels`` and ``cka`` (nested lists).
    """
    for between, fixed in (("blocks", 0), ("timesteps", 1)):
        for at in dict.fromkeys(tap[fixed] for tap in taps):
            own = [i for i, tap in enumerate(taps) if tap[fixed] == at]
            yield {
                "between": between,
                "at": at,
                "labels": [taps[i][1 - fixed] for i in own],
                "cka": values[np.ix_(own, own)].tolist(),
            }


def write_slices(out: Path, found: Sequence[Mapping[str, Any]], caption: str) -> None:
    """Write ``cka.csv`` and a figure of each slice."""
    rows = []
    for part in found:
        fixed, name = ("t", "block b") if part["between"] == "blocks" else ("b", "timestep t")
        title = f"linear CKA between {part['between']} at {fixed} = {part['at']}\n{caption}"
        figure = draw_heatmap(
            np.array(part["cka"]), part["labels"], part["labels"], title=title, row_name=name,
            column_name=name, limits=(0, 1),
        )  # fmt: skip
        save_figure(figure, out / slice_file(part["between"], part["at"]))
        head = {"between": part["between"], "at": f"{fixed}={part['at']}"}
        rows += [
            {**head, "first": first, "second": second, "cka": value}
            for first, line in zip(part["labels"], part["cka"])
            for second, value in zip(part["labels"], line)
        ]
    write_csv(out / "cka.csv", rows)


def slice_file(between: str, at: int) -> str:
    """Return the name of a slice's figure."""
    return f"cka/{between}_{'t' if between == 'blocks' else 'b'}{at}.png"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
