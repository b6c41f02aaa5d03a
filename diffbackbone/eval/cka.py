"""Linear centered kernel alignment (CKA) over minibatches, with the unbiased HSIC estimator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
