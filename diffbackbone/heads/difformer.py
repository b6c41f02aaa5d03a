"""DifFormer: attention over maps of several blocks and timesteps (Section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffbackbone.heads.transformer import Tokenizer, Transformer


class DifFormerHead(nn.Module):
    """Fuses maps of several blocks and timesteps.

    Tokens of all blocks of a timestep go through the transformer together; the CLS tokens of all
    timesteps are concatenated for the linear layer. The transformer is the same for all
    timesteps. So are the tokenizers, of which each block has its own, also where two blocks have
    the same shape (as in the published code).

    The defaults are the paper's choice (Section 4.1.1), for which the 256-px model at 256 px gives
    ``in_channels=(1024, 1024, 512)`` and ``sizes=(8, 16, 64)``. With 50 classes that makes 28.9M
    parameters. Table 15 prints 29.3M, which would need b=19 pooled *up* from 8x8 to 16x16.

    Args:
        in_channels: Channels of the maps, one number for each block.
        num_classes: Number of classes.
        sizes: Height and width of the maps, one number or pair for each block:
            ceil(image size / stride).
        blocks: Block numbers b (1-based); for other backbones any numbers that name the maps.
        timesteps: Timesteps t (0-based); for other backbones ``(0,)``.
        pool: Maps higher or wider than this are pooled to it.
        width: Channels of the tokens.
        first_blocks: Blocks of DifFeed's first pass, beside ``blocks`` of the second; a block of
            both shares its tokenizer. ``in_channels`` and ``sizes`` are for ``blocks``, then for
            those of ``first_blocks`` that ``blocks`` lacks.
        norm: Norm of the tokenizer: ``"layer"``, over the whole map; ``"batch"``; or ``"none"``.
        **options: ``layers``, ``num_heads``, ``mlp_ratio``, ``readout``, ``cls_token`` and
            ``dense`` of :class:`~diffbackbone.heads.transformer.Transformer`.

    Raises:
        ValueError: The heads don't divide the width, or there are not as many channels or sizes as
            blocks.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        sizes: Sequence[int | tuple[int, int]],
        blocks: Sequence[int] = (19, 24, 30),
        timesteps: Sequence[int] = (90, 150, 300),
        pool: int = 16,
        width: int = 1024,
        first_blocks: Sequence[int] = (),
        norm: str = "layer",
        **options: Any,
    ) -> None:
        super().__init__()
        self.blocks, self.timesteps = tuple(blocks), tuple(timesteps)
        self.first_blocks = tuple(first_blocks)
        self.tokenizers = nn.ModuleDict(
            {
                str(b): Tokenizer(channels, size, width, pool, norm=norm)
                for b, channels, size in zip(
                    dict.fromkeys(self.blocks + self.first_blocks), in_channels, sizes, strict=True
                )
            }
        )
        self.transformer = Transformer(width, **options)
        self.linear = nn.Linear(self.transformer.out_features * len(self.timesteps), num_classes)

    def forward(self, maps: Mapping[tuple[Any, ...], Tensor] | Sequence[Tensor]) -> Tensor:
        """Classify the maps of a batch of images.

        Args:
            maps: ``{(t, b): (N, C_b, H_b, W_b)}`` in any order, as
                :meth:`DiffusionBackbone.forward_taps` returns them, with ``(t, b, "first")`` for
                the first pass; or a list with all blocks of the first timestep, those of the first
                pass before the others, then all of the second, and so on.

        Returns:
            Logits (N, num_classes).

        Raises:
            KeyError, ValueError: A map is missing.
            RuntimeError: A map does not fit the head or the others.
        """
        if not isinstance(maps, Mapping):
            taps = [tap for t in self.timesteps for tap in self._taps(t)]
            maps = dict(zip(taps, maps, strict=True))
        vectors = []
        for t in self.timesteps:
            tokens = [self.tokenizers[str(tap[1])](maps[tap]) for tap in self._taps(t)]
            vectors.append(self.transformer(torch.cat(tokens, dim=1)))
        return self.linear(torch.cat(vectors, dim=1))

    def _taps(self, t: int) -> list[tuple[Any, ...]]:
        """Return the names of a timestep's maps in the order of their tokens."""
        return [(t, b, "first") for b in self.first_blocks] + [(t, b) for b in self.blocks]
