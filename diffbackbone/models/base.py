"""The interface of all diffusion networks: numbered blocks, one traversal, taps at any block."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from diffbackbone.models.ops import autocasts, is_readable, layout


@dataclasses.dataclass(frozen=True)
class BlockInfo:
    """One block of a network.

    Attributes:
        index: 1-based block number b, counted over encoder, middle and decoder.
        channels: Channels of the block's output.
        stride: Stride of the output relative to the input image.
        name: Name of the module, as in the state dict (``output_blocks.4``).
        in_channels: Channels that the block reads, the concatenated skip included.
        attention: Whether self-attention follows the block's residual layer.
        resample: ``"down"``, ``"up"`` or None.
        part: ``"encoder"``, ``"middle"``, ``"decoder"`` or, in a network without skips,
            ``"transformer"``. A decoder block reads the output of the encoder block that mirrors
            it.
        kept_values: Values kept for the backward pass, per pixel of the image.
        read_values: The part of them that is kept also when the block is recomputed.
    """

    index: int
    channels: int
    stride: int
    name: str = dataclasses.field(default="", repr=False, compare=False)
    in_channels: int = dataclasses.field(default=0, repr=False, compare=False)
    attention: bool = dataclasses.field(default=False, repr=False, compare=False)
    resample: str | None = dataclasses.field(default=None, repr=False, compare=False)
    part: str = dataclasses.field(default="encoder", repr=False, compare=False)
    kept_values: float = dataclasses.field(default=0.0, repr=False, compare=False)
    read_values: float = dataclasses.field(default=0.0, repr=False, compare=False)


class BlockTable(dict[int, BlockInfo]):
    """The blocks of a network by 1-based number, in the order in which they run."""

    no_feedback: str | None = None
    """Why features can't be fed back into earlier blocks; None where they can."""

    def __init__(self, infos: Iterable[BlockInfo]) -> None:
        super().__init__((info.index, info) for info in infos)
        self._count = len(self)  # torch.compile of torch 2.6 can't call len

    @property
    def num_encoder_blocks(self) -> int:
        """Number of encoder blocks; a U-Net's decoder has as many."""
        return sum(info.part == "encoder" for info in self.values())

    def mirror(self, index: int) -> int:
        """Return the block on the other side of the U: 38 - b for the 256-px models (1-based)."""
        return self._count + 1 - index

    def deepest_stride(self, last: int) -> int:
        """Return the largest stride of blocks 1 to ``last``."""
        return max(self[b].stride for b in range(1, last + 1))

    def check(self, blocks: Iterable[int], what: str = "blocks") -> tuple[int, ...]:
        """Return block numbers as integers; raise a ValueError where one is out of range."""
        given = list(blocks)
        numbers = tuple(map(integer, given))
        if not numbers or any(b not in self for b in numbers):
            parts: dict[str, list[int]] = {}
            for b, info in self.items():
                parts.setdefault(info.part, []).append(b)
            spans = ", ".join(f"{part} {bs[0]}-{bs[-1]}" for part, bs in parts.items())
            raise ValueError(
                f"{what} must be block numbers from 1 to {len(self)} (1-based: {spans}), got "
                f"{given[:8]}"
            )
        return numbers


def is_number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    """Whether a value is a finite number; booleans are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf


def integer(value: Any) -> int | None:
    """Return a Python or numpy integer as an int; None for anything else, booleans included."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """Return a config's list as a tuple; a single integer becomes a tuple of one."""
    if integer(values) is not None:
        return (values,)
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of integers, got {values!r:.200}")
    return tuple(values)


@dataclasses.dataclass
class TraversalState:
    """Where a run through the network stands, so that it can go on from there."""

    index: int  # the last block that ran (1-based); 0 before the first
    h: Tensor  # its output (N, C, H, W)
    emb: Any  # the condition that each block reads, for example the time embedding (N or 1, E)
    last: int  # the last block that will be asked for
    skips: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # that blocks to `last` read
    recompute: frozenset[int] = frozenset()  # blocks that the backward pass computes again

    def inject(self, maps: Sequence[Tensor]) -> None:
        """Add maps to the last block's output, resized bilinearly; the skip carries the sum."""
        for extra in maps:
            self.h = self.h + resize(extra, self.h.shape[-2:]).to(self.h.dtype)
        if self.index in self.skips:
            self.skips[self.index] = self.h


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of maps (N, C, H, W) to ``size``; the same tensor where it fits already."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def check_budget(budget: float | None) -> float | None:
    """Return GB of activations to keep, None for no limit; raise a ValueError if negative."""
    if budget is not None and not (is_number(budget) and budget >= 0):
        raise ValueError(
            "activation_budget must be a number of GB from 0, or None for no limit, got "
            f"{budget!r:.200}"
        )
    return budget


class DiffusionModel(nn.Module):
    """A diffusion network that can be run block by block.

    A family builds its modules, sets up the table, and implements :meth:`embed`.

    Args:
        blocks: The table of all blocks of the architecture.
        last_block: The last block that is built (1-based); None for all.
        activation_checkpointing: Recompute each block in the backward pass instead of keeping its
            activations.
        activation_budget: GB of activations that a run may keep for the backward pass. As many
            blocks are recomputed as that takes, those with the largest maps first: they free the
            most memory for the time. None sets no limit.

    Raises:
        ValueError: ``last_block`` is not a block number, or the budget is negative.
    """

    in_channels: int = 3  # of the images
    num_classes: int | None = None  # None for an unconditional network
    labels_optional: bool = False  # whether a class-conditional network also runs without labels
    noise_schedule: str | Sequence[float] = "linear"  # or "cosine", or the betas of all timesteps
    input_stride: int = 1  # of the input relative to the image; 8 for Stable Diffusion's latents
    learned: tuple[str, ...] = ()  # parameters that are trained also when the network is frozen
    pretrained: bool = False  # whether building the network has loaded its weights
    own_size: tuple[int, int] | None = None  # of images that run without padding
    timed: bool = True  # whether the network reads a timestep
    channels_last: bool = True  # memory format of inference on a CPU

    def __init__(
        self,
        blocks: BlockTable,
        last_block: int | None = None,
        activation_checkpointing: bool = False,
        activation_budget: float | None = None,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.last_block = len(blocks)
        if last_block is not None:
            (self.last_block,) = blocks.check([last_block], "last_block")
        self.activation_checkpointing = activation_checkpointing
        self.activation_budget = check_budget(activation_budget)

    def module(self, index: int) -> nn.Module:
        """Return the module of a block (1-based), called with ``(h, emb)``."""
        return self.get_submodule(self.blocks[index].name)

    def embed(self, t: Tensor | int | float, y: Tensor | None, device: torch.device) -> Any:
        """Return the condition that blocks read, for timesteps t and labels y."""
        raise NotImplementedError

    @property
    def takes_labels(self) -> bool:
        """Whether the network has a class embedding."""
        return self.num_classes is not None

    def check_labels(self, y: Tensor | None, count: int) -> None:
        """Raise a ValueError where class labels are not one for each of ``count`` images."""
        if y is None and (self.labels_optional or not self.takes_labels):
            return
        classes = self.num_classes
        if not self.takes_labels:
            valid, wanted = False, "None, since this network is not class-conditional"
        elif classes is None:  # diffusers' networks that embed numbers or vectors
            valid, wanted = len(y) == count, f"one for each of {count} images"
        else:
            wanted = f"{count} integers from 0 to {classes - 1}, one for each image"
            valid = y is not None and y.shape == (count,) and not y.is_floating_point()
            if valid and is_readable(y):
                valid = bool((y >= 0).all() and (y < classes).all())
        if not valid:
            raise ValueError(f"labels y must be {wanted}, got {y}")

    def check_built(self, blocks: Iterable[int]) -> tuple[int, ...]:
        """Return block numbers; raise a ValueError where one is out of range or not built."""
        numbers = self.blocks.check(blocks)
        if max(numbers) > self.last_block:
            raise ValueError(
                f"block {max(numbers)} is not built: this network ends at {self.last_block}"
            )
        return numbers

    def encode(self, images: Tensor) -> Tensor:
        """Return what noise is added to: the images (N, C, H, W) or their latents."""
        return images

    def tap(self, index: int, state: TraversalState) -> Tensor:
        """Return the features of the block that has just run (1-based)."""
        return state.h

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the weights of a frozen network to another type."""
        self.to(dtype)

    def idle_modules(self, labeled: bool) -> Iterable[nn.Module]:
        """Return modules that runs with or without labels don't use."""
        return ()

    @property
    def weights_dtype(self) -> torch.dtype:
        """Type of the weights, and of the maps between blocks."""
        return next(self.parameters()).dtype

    def start(
        self, x_t: Tensor, t: Tensor | int | float, last: int, y: Tensor | None = None
    ) -> TraversalState:
        """Begin a run that goes no further than block ``last``.

        Args:
            x_t: Noised images or latents (N, C, H, W); H and W, times ``input_stride``, multiples
                of the deepest stride.
            t: Timesteps (N,) or (1,), or one number.
            last: The last block that will be asked for (1-based).
            y: Class labels (N,), for a class-conditional model.
        """
        self.check_built([last])
        deepest = self.blocks.deepest_stride(last) // self.input_stride
        if x_t.shape[-2] % deepest or x_t.shape[-1] % deepest:
            raise ValueError(
                f"height and width must be multiples of {deepest}, got {tuple(x_t.shape[-2:])}"
            )
        self.check_labels(y, x_t.shape[0])
        state = TraversalState(0, x_t.to(self.weights_dtype), self.embed(t, y, x_t.device), last)
        if torch.is_grad_enabled():
            state.recompute = self._recomputed_blocks(state.h, last)
        return state

    def _recomputed_blocks(self, x_t: Tensor, last: int) -> frozenset[int]:
        """Return the blocks to recompute in the backward pass of a run to block ``last``."""
        if self.activation_checkpointing:
            return frozenset(range(1, last + 1))
        if self.activation_budget is None:
            return frozenset()
        bytes_each = 2 if autocasts(x_t) else x_t.element_size()
        bytes_each *= x_t.shape[0] * x_t.shape[2] * x_t.shape[3] * self.input_stride**2
        kept = {b: bytes_each * self.blocks[b].kept_values for b in range(1, last + 1)}
        chosen: set[int] = set()
        for index in sorted(kept, key=lambda b: (self.blocks[b].stride, b)):
            if sum(kept.values()) <= self.activation_budget * 1e9:
                break
            kept[index] = bytes_each * self.blocks[index].read_values
            chosen.add(index)
        return frozenset(chosen)

    def traverse(
        self,
        state: TraversalState,
        stop: int,
        taps: Collection[int] = (),
        inject: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> dict[int, Tensor]:
        """Run the blocks after ``state.index`` up to ``stop``; see :meth:`forward_features`.

        Args:
            state: Where to go on from; it is advanced.
            stop: The last block to run (1-based).
            taps: Blocks whose outputs are returned.
            inject: Maps to add to the output of a block, before it is tapped.
        """
        outputs: dict[int, Tensor] = {}
        if self.channels_last:
            state.h = layout(state.h)
        for index in range(state.index + 1, stop + 1):
            part, mirror = self.blocks[index].part, self.blocks.mirror(index)
            if part == "decoder":
                state.h = torch.cat([state.h, state.skips.pop(mirror)], dim=1)
            state.h = self._run_block(index, state)
            state.index = index
            if part == "encoder" and mirror <= state.last:
                state.skips[index] = state.h
            if inject and index in inject:
                state.inject(inject[index])
            if index in taps:
                outputs[index] = self.tap(index, state)
        return outputs

    def _run_block(self, index: int, state: TraversalState) -> Tensor:
        block = self.module(index)
        if index in state.recompute and torch.is_grad_enabled():
            return activation_checkpoint(block, state.h, state.emb, use_reentrant=False)
        return block(state.h, state.emb)

    def fork(self, state: TraversalState, last: int) -> TraversalState:
        """Copy a state, for a run that goes no further than block ``last`` (1-based)."""
        skips = {i: skip for i, skip in state.skips.items() if self.blocks.mirror(i) <= last}
        return TraversalState(state.index, state.h, state.emb, last, skips, state.recompute)

    def forward_features(
        self,
        x_t: Tensor,
        t: Tensor | int | float,
        blocks: Iterable[int],
        y: Tensor | None = None,
        inject: Mapping[int, Tensor | Sequence[Tensor]] | None = None,
    ) -> dict[int, Tensor]:
        """Return the outputs of any blocks in one run, which stops after the last of them.

        Args:
            x_t: Noised images (N, C, H, W); H and W multiples of the deepest stride.
            t: Timesteps (N,) or (1,), 0-based indices into the schedule, or one number.
            blocks: Block numbers (1-based).
            y: Class labels (N,), for a class-conditional model.
            inject: Maps (N, C_b, h, w) to add to the output of block b, resized bilinearly where
                sizes differ; the skip carries the sum.

        Returns:
            ``{b: (N, C_b, H/stride_b, W/stride_b)}`` in the order asked for.

        Raises:
            ValueError: A block is out of range or not built, or the size or labels don't fit.
        """
        wanted = self.blocks.check(blocks)
        extra = {
            index: [maps] if isinstance(maps, Tensor) else list(maps)
            for index, maps in (inject or {}).items()
        }
        if extra:
            self.blocks.check(extra, "inject")
        state = self.start(x_t, t, max(wanted), y)
        outputs = self.traverse(state, max(wanted), wanted, extra)
        return {index: outputs[index] for index in wanted}
