"""Tokenizer and transformer, the parts that AttentionHead and DifFormerHead share (Section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "identity": nn.Identity}


class Tokenizer(nn.Module):
    """Average pooling, layer norm and 1x1 convolution: a map becomes tokens.

    The layer norm takes mean and variance over the whole map (C, h, w), as in the published code,
    and has a weight and a bias for each of its elements. It is thus the one part that knows
    positions (there is no position embedding), and its parameters fix the size of the token grid.
    Table 2's counts need it so.

    Args:
        in_channels: Channels C of the map.
        size: Height and width of the map, or one number for both.
        width: Channels of the tokens; ``in_channels`` without the convolution.
        pool: A map is pooled where it is higher or wider than this, and never up.
        proj: Have the 1x1 convolution. Table 13's counts leave it out.
        norm: ``"layer"``; ``"batch"``, batch norm; or ``"none"``.
    """

    def __init__(
        self,
        in_channels: int,
        size: int | tuple[int, int],
        width: int,
        pool: int,
        proj: bool = True,
        norm: str = "layer",
    ) -> None:
        super().__init__()
        self.pool = pool
        norms = {
            "layer": lambda: nn.LayerNorm((in_channels, *self.grid(size))),
            "batch": lambda: nn.BatchNorm2d(in_channels),
            "none": nn.Identity,
        }
        self.norm = norms[norm]()
        self.proj = nn.Conv2d(in_channels, width, 1) if proj else nn.Identity()

    def grid(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the token grid for maps of a size."""
        height, width = (size, size) if isinstance(size, int) else size
        return min(height, self.pool), min(width, self.pool)

    def forward(self, x: Tensor) -> Tensor:
        """Turn a map into tokens.

        Args:
            x: Map (N, C, H, W). A side that is pooled may be any size from ``pool`` on, the
                pooled map itself included; a side that is not must be as given at construction.

        Returns:
            Tokens (N, h * w, width), row by row.
        """
        x = x.to(next(self.parameters(), x).dtype)
        x = F.adaptive_avg_pool2d(x, self.grid(x.shape[-2:]))
        return self.proj(self.norm(x)).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v have no bias, the output projection has one.

    q, k and v keep their last dimension contiguous, without which
    :func:`torch.nn.functional.scaled_dot_product_attention` takes its slow kernel.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide width={width}")
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Attend to all tokens.

        Args:
            x: Tokens (N, L, width).
            queries: How many of the first tokens ask; None for all.

        Returns:
            (N, Q, width) with Q the number of tokens that ask.
        """
        q = self.q(x[:, :queries]).unflatten(-1, (self.num_heads, -1))  # (N, Q, heads, d)
        kv = self.kv(x).unflatten(-1, (2, self.num_heads, -1))  # (N, L, 2, heads, d)
        q, k, v = (y.transpose(1, 2) for y in (q, *kv.unbind(2)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP (GELU), each with a residual connection."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """(N, L, width) to (N, Q, width): see :class:`Attention`."""
        x = x[:, :queries] + self.attn(self.norm1(x), queries)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A CLS token in front of the tokens, blocks, and one vector out.

    As in the published code there is no norm after the last block and no dropout. Where only the
    first token leaves, the last block computes only that one: the same result for less work.

    Args:
        width: Channels of the tokens.
        layers: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the blocks' MLPs over ``width``.
        readout: ``"cls"``, the CLS token; ``"mean"`` of the tokens; or ``"flatten"``, all tokens
            joined.
        cls_token: Have a CLS token; None for those that read it out.
        dense: Input width, output width and activation (relu, sigmoid, tanh, identity) of linear
            layers after the readout.
    """

    def __init__(
        self,
        width: int,
        layers: int = 2,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        readout: str = "cls",
        cls_token: bool | None = None,
        dense: Sequence[tuple[int, int, str]] = (),
    ) -> None:
        super().__init__()
        if readout not in ("cls", "mean", "flatten"):
            raise ValueError(f"unknown readout {readout!r}; choose from cls, mean, flatten")
        self.readout = readout
        has_cls = readout == "cls" if cls_token is None else cls_token
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if has_cls else None
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, mlp_ratio) for _ in range(layers)
        )
        self.dense = nn.Sequential()
        for fan_in, fan_out, activation in dense:
            self.dense.extend([nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()])
        self.out_features = dense[-1][1] if dense else width

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L, width), in any order unless flattened, to vectors (N, out_features)."""
        x = tokens
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        *body, last = self.blocks
        for block in body:
            x = block(x)
        if self.readout == "cls":
            x = last(x, queries=1).squeeze(1)
        else:
            x = last(x)
            x = x.mean(1) if self.readout == "mean" else x.flatten(1)
        return self.dense(x)
