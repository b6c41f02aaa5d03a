"""DifFormer: attention over maps of several blocks and timesteps (Section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffbackbone.heads._checks import positive
from diffbackbone.heads.transformer import Tokenizer, Transformer


class DifFormerHead(nn.Module):
    """Fuses maps of several blocks and timesteps.

    Tokens of all blocks of a timestep go through the transformer together; the CLS tokens of all
    timesteps are concatenated for the linear layer. The transformer is the same for all
    timesteps. So are the tokenizers, of which each block has its own, also where two blocks have
    the same shape (as in the published code).

    The defaults are the paper's choice (Section 4.1.1), for which the 256-px model at 256 px gives
    ``in_channels=(1024, 1024, 512)`` and ``sizes=(8, 16, 64)``. With 50 classes that makes 28.9M
    parameters. Table 15 prints 29.3M, which would need b=19 pooled *up* from 8x8 to 16x16; the
    text of Section 3.1 ("only apply pooling when the feature map size is larger") and the
    published code don't pool up, and this head follows them. Table 8's 585M is the U-Net with this
    head and 1,000 classes.

    Initial values: see :class:`~diffbackbone.heads.transformer.Transformer`.

    Args:
        in_channels: Channels of the maps, one number for each block.
        num_classes: Number of classes.
        sizes: Height and width of the maps, one number or pair for each block:
            ceil(image size / stride).
        blocks: Block numbers b (1-based); for other backbones any numbers that name the maps.
        timesteps: Timesteps t (0-based); for other backbones ``(0,)``.
        pool: Maps higher or wider than this are pooled to it.
        width: Channels of the tokens.
        layers: Transformer blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the blocks' MLPs over ``width``.

    Raises:
        ValueError: A number is not a positive integer, the heads don't divide the width, a block
            or timestep comes twice, or there are not as many channels or sizes as blocks.
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
        layers: int = 2,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        positive(num_classes=num_classes)
        self.blocks = _numbers(blocks, "blocks")
        self.timesteps = _numbers(timesteps, "timesteps")
        for name, values in {"in_channels": in_channels, "sizes": sizes}.items():
            given = len(values) if isinstance(values, Sequence) else repr(values)
            if given != len(self.blocks):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(self.blocks)} blocks "
                    f"{self.blocks}, got {given}"
                )
        self.in_channels = tuple(in_channels)
        self.num_classes = num_classes
        self.tokenizers = nn.ModuleDict(
            {
                str(b): Tokenizer(channels, size, width, pool)
                for b, channels, size in zip(self.blocks, in_channels, sizes)
            }
        )
        self.transformer = Transformer(width, layers, num_heads, mlp_ratio)
        self.linear = nn.Linear(width * len(self.timesteps), num_classes)

    def forward(self, maps: Mapping[tuple[int, int], Tensor] | Sequence[Tensor]) -> Tensor:
        """Classify the maps of a batch of images.

        Args:
            maps: ``{(t, b): (N, C_b, H_b, W_b)}`` in any order, as
                :meth:`DiffusionBackbone.forward_taps` returns them; or a list with all blocks of
                the first timestep, then all of the second, and so on.

        Returns:
            Logits (N, num_classes).

        Raises:
            ValueError: Maps are missing or too many, don't belong to the same batch, or one does
                not fit; the message says what does.
        """
        taps = self._by_tap(maps)
        cls_tokens = []
        for t in self.timesteps:
            tokens = [
                tokenizer(taps[t, int(b)], f"the map of t={t}, b={b}")
                for b, tokenizer in self.tokenizers.items()
            ]
            cls_tokens.append(self.transformer(torch.cat(tokens, dim=1)))
        return self.linear(torch.cat(cls_tokens, dim=1))

    def _by_tap(
        self, maps: Mapping[tuple[int, int], Tensor] | Sequence[Tensor]
    ) -> Mapping[tuple[int, int], Tensor]:
        """Give every map its (t, b), and make sure that none is missing or too many."""
        wanted = [(t, b) for t in self.timesteps for b in self.blocks]
        layout = (
            f"this head needs {len(wanted)} maps: blocks {self.blocks} at timesteps "
            f"{self.timesteps}"
        )
        if isinstance(maps, Mapping):
            missing = [tap for tap in wanted if tap not in maps]
            extra = [tap for tap in maps if tap not in wanted]
            if missing or extra:
                raise ValueError(
                    f"{layout}; as keys (t, b) there are {missing} missing and {extra} too many"
                )
        elif isinstance(maps, Tensor) or not isinstance(maps, Sequence):
            raise ValueError(f"{layout}, in a dict by (t, b) or a list; got {type(maps).__name__}")
        elif len(maps) != len(wanted):
            raise ValueError(f"{layout}, in the order {wanted}; got {len(maps)}")
        else:
            maps = dict(zip(wanted, maps))
        batches = {len(x) for x in maps.values() if isinstance(x, Tensor) and x.ndim}
        if len(batches) > 1:
            raise ValueError(f"the maps belong to batches of different sizes: {sorted(batches)}")
        return maps

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"blocks={self.blocks}, timesteps={self.timesteps}"


def _numbers(values: Sequence[int], name: str) -> tuple[int, ...]:
    if not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a sequence of integers, got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be integers from 0, got {value!r}")
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name} must be one or more different numbers, got {list(values)}")
    return tuple(values)
