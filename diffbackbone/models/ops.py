"""How the layers of a U-Net are computed: as plain layers would, faster or in less memory.

Each choice was measured (docs/performance.md). Under ``torch.compile`` and ``torch.export`` the
plain layers run, since the compiler makes such choices itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

GROUPS = 32
"""Groups of every group norm in guided-diffusion; all widths are multiples of it."""
SMALL_MAP, LARGE_WEIGHT = 256, 2**22
"""On a CPU, a 3x3 convolution of at most so many positions (H * W) is a matrix product for each
image if it has at least so many weights, and runs on contiguous maps if it has fewer.

The size of the batch has no say here, so that an image's maps don't depend on it.
"""
UPSAMPLE_POSITIONS = 1024
"""On a CPU, a 3x3 convolution after upsampling from so many (H * W) runs before it instead."""
NORM_CHUNK = 2**25
"""Values that group norm takes to float32 at a time, where no gradient is needed."""
CACHED = 2**19
"""Values that stay in a core's cache between two operations."""


def layout(x: Tensor) -> Tensor:
    """Convert to channels_last for CPU inference."""
    if _picks_kernels(x) and not torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call ``function(*args)``; the backward pass stores only the arguments and recomputes.

    For norm, scale-shift, SiLU and pooling: recomputing them is cheaper than storing their results.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    return activation_checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _picks_kernels(x: Tensor) -> bool:
    """Whether kernels are chosen here: eager mode on a CPU, float32 or bfloat16."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not autocasts(x)
    )


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def is_readable(x: Tensor) -> bool:
    """Whether values can be read: not while tracing, in a CUDA graph or on the meta device."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another type, unless autocast is on, which sees to types itself."""
    return x if x.dtype == dtype or autocasts(x) else x.to(dtype)


class GroupNorm32(nn.GroupNorm):
    """Group norm with 32 groups, computed in float32 whatever the input's type."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = False,
        reuse: bool = False,
    ) -> Tensor:
        """``norm(x) * (1 + scale) + shift``, and SiLU of that if asked for.

        Args:
            x: (N, C, ...).
            scale: (N or 1, C); None for the norm alone. A single row, which serves the whole
                batch, costs nothing: it goes into the norm's own weight and bias.
            shift: The same shape.
            silu: Apply SiLU too.
            reuse: Nobody else reads ``x``, so the result may be written over it.

        Returns:
            The shape and type of ``x``.
        """
        weight, bias = self.weight.float(), self.bias.float()
        rest = None
        if scale is not None and shift is not None:
            scale, shift = 1 + scale.float(), shift.float()
            if scale.shape[0] == 1:
                weight, bias = weight * scale[0], bias * scale[0] + shift[0]
            else:
                rest = [s.to(x.dtype)[(...,) + (None,) * (x.ndim - 2)] for s in (scale, shift)]
        in_place = not torch.is_grad_enabled()
        if rest is None and in_place and x.ndim == 4 and _picks_kernels(x) and _is_nhwc(x):
            y = x if reuse else torch.empty_like(x)
            for source, target in zip(_rows(x), _rows(y)):
                _norm_rows(source, target, weight, bias, self.num_groups, self.eps, silu)
            return y
        y = self._normalize(x, weight, bias)
        if rest is not None:
            y = y.mul_(rest[0]).add_(rest[1]) if in_place else y * rest[0] + rest[1]
        return F.silu(y, inplace=in_place) if silu else y

    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        on_cpu = x.device.type == "cpu"
        if on_cpu and _is_nhwc(x):  # torch's kernel for this format sums inaccurately
            y = self._normalize(x.contiguous(), weight, bias)
            return y.contiguous(memory_format=torch.channels_last)
        if x.dtype == torch.float32 or (on_cpu and x.dtype == torch.bfloat16):
            # the CPU's kernel takes bfloat16 with float32 weights, and computes in float32
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)
        if torch.is_grad_enabled() or x.numel() <= NORM_CHUNK:
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        y = torch.empty_like(x)
        width = x.shape[1] // self.num_groups
        step = width * max(1, self.num_groups * NORM_CHUNK // x.numel())
        for start in range(0, x.shape[1], step):
            part = slice(start, start + step)
            few = x[:, part].float()
            groups = few.shape[1] // width
            y[:, part] = F.group_norm(few, groups, weight[part], bias[part], self.eps)
        return y


def _is_nhwc(x: Tensor) -> bool:
    """Whether the channels are the innermost dimension in memory, and only they can be."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _rows(x: Tensor) -> Tensor:
    """View channels-last maps (N, C, H, W) as (N, H * W, C)."""
    return x.permute(0, 2, 3, 1).view(x.shape[0], -1, x.shape[1])


def _norm_rows(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> None:
    """Group norm and SiLU of one channels-last map, a piece at a time that stays in the cache.

    torch's kernel for this format adds up a million values one after the other, and is off by 2e-4
    at 1024 px. Here each piece has a mean and variance of its own, and they are joined. The result
    of ``x`` (H * W, C) goes to ``y``, which may be ``x``.
    """
    size = max(1, CACHED // x.shape[1])
    pieces = x.split(size)
    stats = [torch.batch_norm_update_stats(piece.float(), None, None, 0.0) for piece in pieces]
    mean, var = (torch.stack(s).view(len(pieces), groups, -1) for s in zip(*stats))
    share = mean.new_tensor([len(piece) for piece in pieces]) / (len(x) * mean.shape[2])
    share = share[:, None, None]
    centre = (share * mean).sum((0, 2), keepdim=True)
    var = (share * (var + (mean - centre).square())).sum((0, 2), keepdim=True)
    factor = weight.view(1, groups, -1) * torch.rsqrt(var + eps)
    offset = (bias.view(1, groups, -1) - centre * factor).flatten()
    factor = factor.flatten()
    for piece, target in zip(pieces, y.split(size)):
        out = target
        if target.dtype != torch.float32:
            out = torch.empty_like(piece, dtype=offset.dtype)
        torch.addcmul(offset, piece.float(), factor, out=out)
        if silu:
            F.silu(out, inplace=True)
        if out is not target:
            target.copy_(out)


class Conv1x1(nn.Conv1d):
    """1x1 convolution (N, C_in, T) to (N, C_out, T), computed as a matrix product of tokens.

    The result is a transposed view: its channels are contiguous in memory.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        return F.linear(x.transpose(1, 2), self.weight.squeeze(-1), self.bias).transpose(1, 2)


class Conv3x3(nn.Conv2d):
    """3x3 convolution with padding 1, (N, C_in, H, W) to (N, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, upsample: bool = False) -> Tensor:
        """Convolve, after doubling the resolution by nearest neighbours if ``upsample`` is set."""
        picks = _picks_kernels(x) and self.weight.dtype == x.dtype
        positions = x.shape[2] * x.shape[3]
        if upsample:
            if picks and x.dtype == torch.float32 and positions >= UPSAMPLE_POSITIONS:
                return self._before_upsampling(x)
            x, positions = F.interpolate(x, scale_factor=2.0, mode="nearest"), 4 * positions
        if picks and positions <= SMALL_MAP and self.weight.is_contiguous():
            if self.weight.numel() >= LARGE_WEIGHT:
                return self._as_product(x)
            y = super().forward(x.contiguous())  # more exact than on channels-last maps
            return y.contiguous(memory_format=torch.channels_last) if _is_nhwc(x) else y
        return super().forward(x)

    def _as_product(self, x: Tensor) -> Tensor:
        """Gather the 3x3 neighbourhoods and multiply.

        On small maps the time goes into reading a large weight, which oneDNN's convolution reorders
        in every call and a matrix product does not.
        """
        n, _, height, width = x.shape
        columns = F.unfold(x, 3, padding=1)  # (N, 9 C_in, H W)
        weight = self.weight.flatten(1).expand(n, -1, -1)
        out = torch.baddbmm(self.bias[:, None], weight, columns).view(n, -1, height, width)
        return out.contiguous(memory_format=torch.channels_last) if _is_nhwc(x) else out

    def _before_upsampling(self, x: Tensor) -> Tensor:
        """Convolve the small map by the four 2x2 kernels that the 3x3 kernel amounts to.

        After doubling by nearest neighbours, an output at an even row 2i sees row i - 1 once and
        row i twice, one at an odd row 2i + 1 row i twice and row i + 1 once; columns likewise.
        That takes 4/9 of the multiplications.
        """
        n, _, height, width = x.shape
        weight = self.weight
        rows = [
            torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], dim=2),
            torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], dim=2),
        ]
        phases = []
        for row in rows:  # (C_out, C_in, 2, 3)
            phases.append(torch.stack([row[..., 0], row[..., 1] + row[..., 2]], dim=3))
            phases.append(torch.stack([row[..., 0] + row[..., 1], row[..., 2]], dim=3))
        bias = None if self.bias is None else self.bias.repeat(4)
        grid = F.conv2d(x, torch.cat(phases), bias, padding=1)  # (N, 4 C_out, H + 1, W + 1)
        is_nhwc = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_nhwc else torch.contiguous_format
        shape = (n, self.out_channels, 2 * height, 2 * width)
        out = torch.empty(shape, dtype=grid.dtype, device=grid.device, memory_format=layout)
        for phase, piece in enumerate(grid.chunk(4, dim=1)):
            row, column = divmod(phase, 2)
            piece = piece[..., row : row + height, column : column + width]
            out[..., row::2, column::2] = piece
        return out
