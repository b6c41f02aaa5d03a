"""Linear probes of many taps, poolings and learning rates, trained from one run of the network.

Nothing is cached: in every step the network runs once for each timestep, and the probes of all
blocks, poolings and learning rates learn from what it returns. The protocol is the paper's (Section
4): Adam, cross-entropy, mirrored images, 28 epochs, the rate divided by 10 after each quarter of
them (7 epochs at least). For each tap and rate two probes are trained side by side: one without the
held-out training images, on which the smallest loss chooses the rate, and one on all of them.
Unlike in the paper, features are standardized, unless that is turned off: the same rates then suit
all blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.checkpoint import read_checkpoint
from diffbackbone.eval.data import ImageFolder, RowImages, load_batches, split_holdout
from diffbackbone.eval.features import FeatureSpec, autocast, pool_maps
from diffbackbone.utils import RandomStream, UserError, atomic_write

STEP, GAMMA, HOLDOUT = 7, 0.1, 0.2
STANDARD = 10_000
"""Training images, at most, that mean and standard deviation of the features are computed from."""
BYTES = 16
"""Bytes of a weight with its gradient and Adam's two moments."""

Key = tuple[int, int]
"""Block and pool: the probes that share one shape."""


@dataclass(kw_only=True)
class OnePassOptions:
    """How one-pass probes are trained."""

    lr: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """One-pass probes: learning rates; held-out training images choose one for each tap."""
    epochs: int = 28
    """One-pass probes: epochs."""
    probe_batch: int = 128
    """One-pass probes: images of a step; with few images a smaller number gives more steps."""
    flip: bool = True
    """One-pass probes: mirror images at random; --no-flip for text and digits."""
    standardize: bool = True
    """One-pass probes: standardize features, as cached probes do; the paper doesn't."""
    probe_memory: float = 8.0
    """One-pass probes: GB that they may take with gradients and moments."""


class ProbeGrid(nn.Module):
    """Linear probes on blocks and pools, for each timestep, in several copies that start the same.

    ``weights`` of (b, pool, copy) are (T, classes, features), a probe for each timestep; ``means``
    and ``scales`` of (b, pool), (T, 1, features), standardize the features of all copies.
    """

    def __init__(
        self, features: Mapping[Key, int], timesteps: int, copies: int, classes: int, seed: int
    ) -> None:
        super().__init__()
        self.copies, self.keys = copies, tuple(features)
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        self.means, self.scales = nn.ParameterDict(), nn.ParameterDict()
        for key, size in features.items():
            for part, value in (self.means, 0.0), (self.scales, 1.0):
                values = torch.full((timesteps, 1, size), value)
                part[self.name(key)] = nn.Parameter(values, requires_grad=False)
            generator = torch.Generator().manual_seed(seed)
            start = torch.rand(timesteps, classes, size, generator=generator) * 2 - 1
            start /= size**0.5
            for copy in range(copies):
                name = self.name(key, copy)
                self.weights[name] = nn.Parameter(start.clone())
                self.biases[name] = nn.Parameter(torch.zeros(timesteps, 1, classes))

    @staticmethod
    def name(key: Key, copy: int | None = None) -> str:
        """Return the name of a block and a pool, and of a copy of their probes."""
        return f"b{key[0]}_p{key[1]}" if copy is None else f"b{key[0]}_p{key[1]}_{copy}"

    def forward(self, x: Mapping[Key, Tensor]) -> Iterator[tuple[Key, int, Tensor]]:
        """Yield (key, copy, scores (T, N, classes)) of features (T, N, D) of each key."""
        for key in self.keys:
            scaled = (x[key] - self.means[self.name(key)]) * self.scales[self.name(key)]
            for copy in range(self.copies):
                name = self.name(key, copy)
                yield key, copy, torch.baddbmm(self.biases[name], scaled, self.weights[name].mT)

    def parameters_of(self, copy: int) -> list[nn.Parameter]:
        """Return the parameters of one copy."""
        names = [self.name(key, copy) for key in self.keys]
        return [part[name] for name in names for part in (self.weights, self.biases)]


@dataclass
class OnePass:
    """Trains the probes; probes that exceed the memory are trained one part after the other.

    The frozen backbone is on the device of ``state``, whose processes share the work; ``folder``
    keeps the state of a run, so that a killed one continues.
    """

    options: OnePassOptions
    backbone: DiffusionBackbone
    spec: FeatureSpec
    pools: Sequence[int]
    folder: Path
    workers: int
    state: PartialState

    def plan(self, classes: int) -> list[dict[Key, int]]:
        """Divide the probes into parts that fit the memory; print what they take."""
        parts: list[dict[Key, int]] = [{}]
        used, most, memory = 0, 0, 1e9 * self.options.probe_memory
        for block in sorted(self.spec.blocks):
            for pool in self.pools:
                channels, side, _ = self.spec.shape(self.backbone.unet.blocks[block])
                features = channels * min(side, pool) ** 2
                cells = len(self.spec.timesteps) * 2 * len(self.options.lr)
                size = BYTES * cells * classes * (features + 1)
                if size > memory:
                    raise UserError(
                        f"the probes of block {block}, pool {pool} take {size / 1e9:.1f} GB: "
                        f"allow more by --probe-memory, or give fewer --lr or --timesteps"
                    )
                if used + size > memory:
                    parts.append({})
                    used = 0
                parts[-1][block, pool] = features
                used += size
                most = max(most, used)
        if self.state.is_main_process:
            count = sum(map(len, parts)) * len(self.spec.timesteps) * 2 * len(self.options.lr)
            print(
                f"{count:,} linear probes in {len(parts)} part(s); with gradients and Adam's "
                f"moments they take at most {most / 1e9:.3g} GB",
                flush=True,
            )
        return parts

    def run(self, train: ImageFolder, val: ImageFolder, seed: int) -> list[dict[str, Any]]:
        """Train on one draw of labels; return a record of each tap and pool.

        Its ``linear`` is the accuracy on the validation images of the probe that learned from all
        training images, ``lr`` the chosen rate.
        """
        records = []
        for number, features in enumerate(self.plan(len(train.classes))):
            records += self._run_part(train, val, seed, number, features)
        return records

    def _run_part(
        self, train: ImageFolder, val: ImageFolder, seed: int, number: int, sizes: dict[Key, int]
    ) -> list[dict[str, Any]]:
        options, classes, device = self.options, len(train.classes), self.state.device
        timesteps, rates = self.spec.timesteps, 2 * options.lr
        grid = ProbeGrid(sizes, len(timesteps), len(rates), classes, seed).to(device)
        optimizer = torch.optim.Adam([{"params": grid.parameters_of(i)} for i in range(len(rates))])
        _, held = split_holdout(train.labels, HOLDOUT, seed)
        learns = torch.ones(len(train), device=device)
        learns[held] = 0  # for the first half of the probes
        labels = torch.from_numpy(train.labels).to(device)
        path = self.folder / f"probes-{seed}-{number}.pt"
        names = ("lr", "probe_batch", "flip", "standardize")
        given = [getattr(options, name) for name in names]
        settings = json.dumps([[*map(list, sizes)], timesteps, *given, train.digest(), seed])
        first = 0
        if path.is_file():
            saved = read_checkpoint(path)
            if saved["settings"] == settings:
                grid.load_state_dict(saved["grid"])
                optimizer.load_state_dict(saved["optimizer"])
                first = saved["epoch"]
        if options.standardize and not first:
            self._measure(grid, train, seed)
        for epoch in range(first, options.epochs):
            for group, lr in zip(optimizer.param_groups, rates):
                group["lr"] = lr * GAMMA ** (epoch // max(STEP, options.epochs // 4))
            rows = RandomStream.PERMUTATION.generator(seed, epoch).permutation(len(train))
            flips = RandomStream.FLIPS.generator(seed, epoch).random(len(train)) < 0.5
            if options.flip:
                rows = rows + len(train) * flips[rows]
            for x, images, batch in self._batches(train, rows, grid.keys, f"epoch {epoch + 1}"):
                optimizer.zero_grad()
                loss = x[grid.keys[0]].new_zeros((), requires_grad=True)
                shares = learns[images] / learns[batch].sum().clamp_min(1), 1 / len(batch)
                for _, copy, scores in grid(x) if len(images) else ():
                    truth = labels[images].expand(len(scores), -1)
                    losses = F.cross_entropy(scores.transpose(1, 2), truth, reduction="none")
                    loss = loss + (losses * shares[copy // len(options.lr)]).sum()
                loss.backward()
                self._reduce(grid)
                optimizer.step()
            if self.state.is_main_process:
                content = {"settings": settings, "epoch": epoch + 1, "grid": grid.state_dict()}
                content["optimizer"] = optimizer.state_dict()
                atomic_write(path, lambda file, content=content: torch.save(content, file))
        losses, _ = self._evaluate(grid, train, held)
        _, accuracies = self._evaluate(grid, val, np.arange(len(val)))
        records = []
        for index, (block, pool) in enumerate(grid.keys):
            for place, t in enumerate(timesteps):
                best = int(losses[index, : len(options.lr), place].argmin())
                whole = best + len(options.lr)
                record = {"b": block, "t": t, "pool": pool, "seed": seed}
                record |= {"features": sizes[block, pool], "train_images": len(train)}
                record |= {"linear": accuracies[index, whole, place].item(), "lr": options.lr[best]}
                records.append(record)
        return records

    def _sum(self, x: Tensor) -> Tensor:
        """Add up over all processes, in place."""
        if self.state.num_processes > 1:
            dist.all_reduce(x)
        return x

    def _reduce(self, grid: ProbeGrid) -> None:
        """Add up the gradients of all processes; one without images has none."""
        for parameter in (*grid.weights.values(), *grid.biases.values()):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._sum(parameter.grad)

    @torch.no_grad()
    def _measure(self, grid: ProbeGrid, train: ImageFolder, seed: int) -> None:
        """Compute mean and standard deviation of each feature; constant ones keep their scale."""
        rows = RandomStream.ORDER.generator(seed).permutation(len(train))[:STANDARD]
        means = {key: grid.means[grid.name(key)] for key in grid.keys}  # (T, 1, D) each
        sums = {key: torch.stack([x, x]).double() for key, x in means.items()}
        for x, own, _ in self._batches(train, rows, grid.keys, "mean and deviation"):
            for key, values in x.items() if len(own) else ():
                wide = values.double()
                sums[key] += torch.stack([wide.sum(1, True), wide.square().sum(1, True)])
        for key, total in sums.items():
            mean, square = self._sum(total) / len(rows)
            deviation = (square - mean.square()).clamp_min(0).sqrt()
            varies = deviation > 1e-6 * mean.abs()
            means[key].copy_(mean)
            grid.scales[grid.name(key)].copy_(torch.where(varies, 1 / deviation, 1))

    @torch.no_grad()
    def _evaluate(
        self, grid: ProbeGrid, images: ImageFolder, rows: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Return mean losses and accuracies, both (keys, copies, T)."""
        shape = 2, len(grid.keys), grid.copies, len(self.spec.timesteps)
        sums = torch.zeros(shape, dtype=torch.float64, device=self.state.device)
        labels = torch.from_numpy(images.labels).to(self.state.device)
        for x, own, _ in self._batches(images, rows, grid.keys, "evaluation"):
            for key, copy, scores in grid(x) if len(own) else ():
                truth = labels[own].expand(len(scores), -1)
                losses = F.cross_entropy(scores.transpose(1, 2), truth, reduction="none")
                found = torch.stack([losses, (scores.argmax(2) == truth).float()])
                sums[:, grid.keys.index(key), copy] += found.sum(2)
        losses, hits = self._sum(sums).cpu() / len(rows)
        return losses, hits

    @torch.no_grad()
    def _batches(
        self, images: ImageFolder, rows: np.ndarray, keys: Sequence[Key], what: str
    ) -> Iterator[tuple[dict[Key, Tensor], Tensor, Tensor]]:
        """Yield features (T, N, D) of this process's images, their numbers, and the batch's."""
        rank, world = self.state.process_index, self.state.num_processes
        size = self.options.probe_batch
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        pieces = [np.array_split(batch, world)[rank] for batch in batches]
        own = [piece if len(piece) else batch[:1] for piece, batch in zip(pieces, batches)]
        loaded = load_batches(RowImages(images, self.spec.image_size), own, self.workers)
        blocks = sorted({block for block, _ in keys})
        bar = tqdm(
            loaded, what, len(own), unit="batch", leave=False,
            disable=None if self.state.is_main_process else True,
        )  # fmt: skip
        for pixels, piece, batch in zip(bar, pieces, batches):
            found: dict[Key, list[Tensor]] = {key: [] for key in keys}
            # in parts of the same size as elsewhere, which bound the network's memory
            for part in pixels.to(self.state.device).split(self.spec.batch):
                with autocast(part.device, self.spec.compute):
                    taps = self.backbone.forward_taps(part, self.spec.timesteps, blocks)
                for block, pool in keys:
                    maps = [taps[t, block] for t in self.spec.timesteps]
                    found[block, pool].append(
                        torch.stack([pool_maps(x, pool).float().flatten(1) for x in maps])
                    )
            x = {key: torch.cat(parts, dim=1)[:, : len(piece)] for key, parts in found.items()}
            numbers = (torch.from_numpy(part % len(images)) for part in (piece, batch))
            yield x, *(part.to(self.state.device) for part in numbers)


def cache_bytes(spec: FeatureSpec, backbone: DiffusionBackbone, images: int) -> int:
    """Return the size of a cache of all taps of some images."""
    numbers = sum(int(np.prod(spec.shape(backbone.unet.blocks[b]))) for b in spec.blocks)
    return 2 * numbers * len(spec.timesteps) * images
