"""Count parameters, operations and memory of each block on torch's meta device, without running."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from diffbackbone.models import build_network
from diffbackbone.models.gd_config import UNetConfig

if TYPE_CHECKING:
    from diffbackbone.models.diffusers import DiffusersConfig


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """Cost of running a U-Net up to a block, for one image in inference."""

    index: int  # block number b, 1-based
    name: str  # module in guided-diffusion's naming
    channels: int  # shape of the block's output
    stride: int
    height: int
    width: int
    parameters: int  # of the block itself
    total_parameters: int  # of a network that ends here, without output layer
    flops: int  # from the image to here; a multiplication and an addition are two
    activation_bytes: int  # peak of the activations alive at once


class LiveTensors(TorchDispatchMode):
    """Count the bytes of the tensors made under this mode: alive (`now`), and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._owners: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
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


class FusedAttention(TorchFunctionMode):
    """Keep the matrices of attention out of a count's peak: fused kernels don't hold them."""

    def __init__(self, live: LiveTensors) -> None:
        super().__init__()
        self.live = live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        peak = self.live.peak
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.live.peak = max(peak, self.live.now)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Yield a counter whose ``get_total_flops()`` are the operations run under it."""
    with FlopCounterMode(display=False) as counter:
        for suffix in ("", "_backward"):  # the CPU's attention, which torch doesn't count
            on_cpu, on_gpu = (
                getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{device}{suffix}")
                for device in ("_for_cpu", "")
            )
            counter.flop_registry[on_cpu] = counter.flop_registry[on_gpu]
        # Don't count by module: the hooks break re-entrant activation checkpointing.
        counter.mod_tracker.__exit__(None, None, None)
        yield counter


def block_costs(
    config: UNetConfig | DiffusersConfig,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    last_block: int | None = None,
) -> list[BlockCost]:
    """Return the cost of each block for one image, in the order in which they run.

    Args:
        config: The architecture; an autoencoder counts as part of the network.
        height: Height of the image in pixels, a multiple of the deepest stride.
        width: Width of the image, likewise.
        dtype: Type of weights and activations.
        last_block: Block to stop at; None goes to the last one.
    """
    blocks = config.blocks
    last_block = len(blocks) if last_block is None else last_block
    with torch.device("meta"):
        unet = build_network(config, last_block).to(dtype).eval()
        image = torch.empty(1, config.in_channels, height, width, dtype=dtype)
        labels = None
        if config.num_classes is not None and not unet.labels_optional:
            labels = torch.empty(1, dtype=torch.long)
    own = {b: _count_parameters(unet.module(b)) for b in range(1, last_block + 1)}
    costs, total = [], _count_parameters(unet) - sum(own.values())
    x_start, *encoding = _count(lambda: unet.encode(image))
    for index in own:
        block = blocks[index]
        total += own[index]
        run = functools.partial(unet.forward_features, x_start, 0, (index,), labels)
        _, flops, peak = _count(run)
        costs.append(
            BlockCost(
                index=index,
                name=block.name,
                channels=block.channels,
                stride=block.stride,
                height=height // block.stride,
                width=width // block.stride,
                parameters=own[index],
                total_parameters=total,
                flops=encoding[0] + flops,
                activation_bytes=max(encoding[1], peak),
            )
        )
    return costs


@torch.no_grad()
def _count(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """Call a function, and return its result, operations and peak of activation bytes."""
    with counting_flops() as counter, LiveTensors() as live, FusedAttention(live):
        result = run()
    return result, counter.get_total_flops(), live.peak


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
