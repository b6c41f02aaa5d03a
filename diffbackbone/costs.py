"""What a U-Net costs to run, block by block, without running it.

Everything is counted on torch's meta device: shapes are real, numbers are not there, so the model
of 553M parameters at 1024 px takes a second and no memory.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import UNet


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """What it takes to get to a block, for one image.

    Attributes:
        index: Block number b, 1-based.
        name: Module in guided-diffusion's naming.
        channels: Channels of its output.
        stride: Stride of its output.
        height: Height of its output.
        width: Width of its output.
        parameters: Parameters of the block itself.
        total_parameters: Parameters of a U-Net that ends here, which has no output layer.
        flops: Floating-point operations from the image to here, a multiplication and an addition
            counted as two, as torch counts them.
        activation_bytes: Most bytes of activations alive at once on the way, in inference.
    """

    index: int
    name: str
    channels: int
    stride: int
    height: int
    width: int
    parameters: int
    total_parameters: int
    flops: int
    activation_bytes: int


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors made under it that are alive, and their peak.

    Views share the bytes of what they view. Tensors made before don't count.

    Attributes:
        now: Bytes alive.
        peak: Most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._owners: dict[int, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if _is_tensor(x)
        }
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if _is_tensor(x):
                self._track(x, known)
        return out

    def _track(self, x: Tensor, inputs: set[int]) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._owners:
            if key in inputs:
                return  # a view of a tensor from before
            self._owners[key] = 0
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._owners[key] += 1
        weakref.finalize(x, self._release, key, storage.nbytes()).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key]
            self.now -= size


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Count floating-point operations; ``get_total_flops()`` of what this gives tells them."""
    with FlopCounterMode(display=False) as counter:
        yield counter


def block_costs(
    config: UNetConfig,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    last_block: int | None = None,
) -> list[BlockCost]:
    """What each block costs, for one image.

    Args:
        config: The architecture.
        height: Height of the image in pixels, a multiple of the deepest stride.
        width: Width of the image, likewise.
        dtype: Type of the activations.
        last_block: Where to stop; None goes to the last block.

    Returns:
        One entry a block, in the order in which they run.

    Raises:
        ValueError: The size is not a multiple of the deepest stride.
    """
    blocks = config.blocks
    deepest = max(block.stride for block in blocks.values())
    if height < 1 or width < 1 or height % deepest or width % deepest:
        raise ValueError(f"height and width must be multiples of {deepest}, got {height}x{width}")
    last_block = len(blocks) if last_block is None else last_block
    config.blocks.check((last_block,))
    with torch.device("meta"):
        unet = UNet(config, last_block=last_block).to(dtype).eval()
        image = torch.empty(1, 3, height, width, dtype=dtype)
        labels = None if config.num_classes is None else torch.empty(1, dtype=torch.long)
    outside = sum(p.numel() for p in unet.parameters()) - sum(
        p.numel() for b in range(1, last_block + 1) for p in unet.module(b).parameters()
    )
    costs, total = [], outside
    for index in range(1, last_block + 1):
        block = blocks[index]
        own = sum(p.numel() for p in unet.module(index).parameters())
        total += own
        with torch.no_grad(), counting_flops() as counter, LiveTensors() as live:
            unet.forward_features(image, 0, (index,), labels)
        costs.append(
            BlockCost(
                index=index,
                name=block.name,
                channels=block.channels,
                stride=block.stride,
                height=height // block.stride,
                width=width // block.stride,
                parameters=own,
                total_parameters=total,
                flops=counter.get_total_flops(),
                activation_bytes=live.peak,
            )
        )
    return costs
