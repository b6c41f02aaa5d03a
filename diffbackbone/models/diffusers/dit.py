"""Diffusion transformers of diffusers, run block by block."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from diffbackbone.models.base import BlockInfo, BlockTable, TraversalState
from diffbackbone.models.diffusers.model import Condition, DiffusersModel, vae_stride


class DiTBlock(nn.Module):
    """One transformer block on tokens that are kept as maps; the first one also cuts patches."""

    def __init__(self, block: nn.Module, patches: nn.Module | None = None) -> None:
        super().__init__()
        self.patches = patches
        self.block = block

    def forward(self, h: Tensor, cond: Condition) -> Tensor:
        """(N, C, H, W) to (N, D, H', W'), where D are the tokens' channels."""
        size = h.shape[-2:]
        if self.patches is None:
            tokens = to_tokens(h)
        else:
            size = [side // self.patches.patch_size for side in size]
            tokens = self.patches(h)
        return to_maps(self.block(tokens, timestep=cond.t, class_labels=cond.y), size)

    def modulate(self, h: Tensor, cond: Condition) -> Tensor:
        """Apply the layer norm and modulation in front of the block's attention to a map."""
        tokens = self.block.norm1(to_tokens(h), cond.t, cond.y, hidden_dtype=h.dtype)[0]
        return to_maps(tokens, h.shape[-2:])


def to_tokens(h: Tensor) -> Tensor:
    """(N, D, H, W) to (N, H * W, D)."""
    return h.flatten(2).transpose(1, 2)


def to_maps(tokens: Tensor, size: Any) -> Tensor:
    """(N, H * W, D) to (N, D, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))


class DiffusersDiT(DiffusersModel):
    """``DiTTransformer2DModel``: block b is transformer block b, and maps are its tokens.

    Taps are normalized: by the layer norm and the modulation of the block itself, since a few
    channels of the raw ones are hundreds of times as large as all others.

    Args:
        net: See :class:`DiffusersModel`.
        vae: See :class:`DiffusersModel`.
        raw: Tap the blocks' outputs as they are.
        **options: See :class:`DiffusionModel`.
    """

    anchor = "pos_embed.proj.weight"

    def __init__(
        self,
        net: DiTTransformer2DModel,
        vae: nn.Module | None = None,
        raw: bool = False,
        **options: Any,
    ) -> None:
        stride = net.config.patch_size * (1 if vae is None else vae_stride(vae))
        width = net.inner_dim
        infos, modules = [], []
        for i, block in enumerate(net.transformer_blocks):
            name = f"transformer_blocks.{i}"
            infos.append(BlockInfo(i + 1, width, stride, name, width, True, part="transformer"))
            modules.append(DiTBlock(block, net.pos_embed if i == 0 else None))
        super().__init__(net, vae, BlockTable(infos), modules, **options)
        self.raw = raw
        self.num_classes = net.config.num_embeds_ada_norm
        for name in ("norm_out", "proj_out_1", "proj_out_2"):
            delattr(net, name)
        for block in net.transformer_blocks:
            # labels are dropped by leaving them out
            block.norm1.emb.class_embedder.dropout_prob = 0

    def embed(
        self,
        t: Tensor | int | float,
        y: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Condition:
        """Return timesteps and labels, which each block embeds; no label is a class of its own."""
        t = torch.as_tensor(t, device=device).reshape(-1)
        if y is None:
            y = torch.full((1,), self.num_classes, device=t.device)
        return Condition(None, t=t, y=y)

    def tap(self, index: int, state: TraversalState) -> Tensor:
        """Return the output of a block, normalized unless raw ones were asked for."""
        return state.h if self.raw else self.module(index).modulate(state.h, state.emb)
