"""Checks of arguments and of maps that all heads share."""

from __future__ import annotations

import torch
from torch import Tensor


def positive(**values: int) -> None:
    """Make sure that every value is a positive integer.

    Raises:
        ValueError: One is not; the message names it.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def pair(size: int | tuple[int, int], name: str = "size") -> tuple[int, int]:
    """Height and width, from one number or two.

    Raises:
        ValueError: Not one or two positive integers.
    """
    height, width = (size, size) if isinstance(size, int) else _two(size, name)
    positive(**{name: height})
    positive(**{name: width})
    return height, width


def _two(size: tuple[int, int], name: str) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"{name} must be an integer or (height, width), got {size!r}")
    return size[0], size[1]


def check_map(x: Tensor, in_channels: int, dtype: torch.dtype, what: str = "a map") -> Tensor:
    """Validate a map and bring it to the type of a head's weights.

    The published code, too, brings half-precision features to float32 before the head.

    Args:
        x: Map (N, C, H, W).
        in_channels: C that the head was built for.
        dtype: Type of the head's weights.
        what: Name of the map in the error.

    Returns:
        The map (N, C, H, W) in ``dtype``.

    Raises:
        ValueError: Not a floating-point map (N, C, H, W), or C is another.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"{what} must be a floating-point tensor (N, C, H, W), got {given}")
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f"{what} must be (N, {in_channels}, H, W) for this head (in_channels={in_channels}), "
            f"got {tuple(x.shape)}"
        )
    return x.to(dtype)
