"""DifFeed: two passes through the U-Net with learned feedback between them (Section 3.3).

The first pass collects decoder features without gradient. Each source block has layers of its own,
a 1x1 convolution, batch norm and ReLU in the paper. The second pass sees the same x_t and adds the
feedback to the output of encoder blocks; it starts from what the first pass has already computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffbackbone.models.base import BlockTable, DiffusionModel
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.ops import as_type

STRATEGIES = ("all", "bottleneck", "windowed", "multi-scale")
LAYERS = ("conv", "batch", "group", "relu", "silu", "depthwise")
"""Kinds of feedback layers: 1x1 convolution, batch norm, group norm (32 groups), ReLU, SiLU, and
depthwise 3x3 convolution; convolutions have no bias."""
DEFAULT_LAYERS = ("conv", "batch", "relu")
"""The paper's feedback layers."""
_WINDOW = 5


def feedback_map(blocks: BlockTable, strategy: str | Mapping[int, int]) -> dict[int, int]:
    """Return source block -> target block, both 1-based, of a strategy (Section 4.1.1, Table 4).

    * ``all``: every decoder block b into its mirror, encoder block 38 - b.
    * ``bottleneck``: the decoder blocks that mirror the first residual block of each encoder
      level: 21, 24, 27, 30, 33, 36 in the 256-px models.
    * ``windowed``: the first five decoder blocks into their mirrors.
    * ``multi-scale``: the first five decoder blocks, all into the mirror of the fifth (block 14).

    Args:
        blocks: The network's blocks; the numbers above are for the 37 of the 256-px models.
        strategy: A name, or a map {source: target}; its numbers may be digits, as config files
            write them. A string of pairs is a map, too: ``"24:14,21:17"``.

    Raises:
        ValueError: Unknown name, or one for a network without decoder; a number out of range, a
            target in the decoder, or a source that does not come after its target.
    """
    if blocks.no_feedback:
        raise ValueError(f"feedback {strategy!r:.200}: {blocks.no_feedback}")
    encoder = blocks.num_encoder_blocks
    decoder = [b for b, info in blocks.items() if info.part == "decoder"]
    if isinstance(strategy, str) and ":" in strategy:
        pairs = [pair.partition(":") for pair in strategy.split(",")]
        strategy = {source.strip(): target.strip() for source, _, target in pairs}
    if isinstance(strategy, Mapping):
        sources = blocks.check(map(_integer, strategy), "feedback sources")
        targets = blocks.check(map(_integer, strategy.values()), "feedback targets")
    elif strategy not in STRATEGIES:
        raise ValueError(
            f"unknown feedback {strategy!r:.200}; choose from {', '.join(STRATEGIES)}, or give a "
            "map {source block: target block}"
        )
    elif len(decoder) < (1 if strategy in ("all", "bottleneck") else _WINDOW):
        raise ValueError(
            f"feedback {strategy!r} pairs encoder and decoder blocks, of which this network has "
            f"{len(decoder)}: give a map {{source block: target block}}"
        )
    else:
        sources = decoder
        if strategy == "bottleneck":
            firsts = [2, *(b + 1 for b in range(2, encoder) if blocks[b].resample == "down")]
            sources = [blocks.mirror(b) for b in firsts]
        elif strategy != "all":
            sources = decoder[:_WINDOW]
        targets = [blocks.mirror(b) for b in sources]
        if strategy == "multi-scale":
            targets = [targets[-1]] * _WINDOW
    mapping = dict(zip(sources, targets))
    # a transformer has no encoder: its blocks are all alike
    kind, last = ("an encoder", encoder) if decoder else ("a", len(blocks))
    for source, target in mapping.items():
        if target > last or source <= target:
            raise ValueError(
                f"feedback {source} -> {target}: the target must be {kind} block (1 to {last}) "
                "that comes before its source"
            )
    return dict(sorted(mapping.items()))


def _integer(number: Any) -> Any:
    digits = isinstance(number, str) and number.isdecimal() and len(number) < 9
    return int(number) if digits else number


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics for a single value: that has no variance."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


def _build_layers(kinds: Sequence[str], channels: int, out_channels: int) -> nn.Sequential:
    """Build one source block's layers; the first 1x1 convolution changes the channels."""
    layers = nn.Sequential()
    for kind in kinds:
        match kind:
            case "conv":
                layers.append(nn.Conv2d(channels, out_channels, 1, bias=False))
                channels = out_channels
            case "depthwise":
                conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
                layers.append(conv)
            case "batch":
                layers.append(_BatchNorm(channels))
            case "group":
                layers.append(nn.GroupNorm(32, channels))
            case "relu" | "silu":  # the source's own output is not written over
                activation = nn.ReLU if kind == "relu" else nn.SiLU
                layers.append(activation(inplace=len(layers) > 0))
            case _:
                raise ValueError(
                    f"unknown feedback layer {kind!r}; choose from {', '.join(LAYERS)}"
                )
    return layers


class Feedback(nn.ModuleDict):
    """The feedback network, and the two passes that use it.

    Its layers are named after their source block: with the paper's, ``<b>.0`` is the 1x1
    convolution (no bias), ``<b>.1`` the batch norm. Table 4 gives their parameters for the 256-px
    model: all 7.6M, bottleneck 2.8M, windowed and multi-scale 5.2M (the convolutions' 5,242,880;
    batch norm brings it to 5,253,120).

    Args:
        config: Architecture of the U-Net, or the network.
        strategy: See :func:`feedback_map`.
        first_pass_grad: Let gradients through the first pass too (the paper does not).
        layers: What each source's features go through, of :data:`LAYERS`, in order. ``"conv"``
            changes the channels to the target's; group norm needs multiples of 32.

    Attributes:
        mapping: Source block -> target block, 1-based.

    Raises:
        ValueError: See :func:`feedback_map`; an unknown layer.
    """

    def __init__(
        self,
        config: UNetConfig | DiffusionModel,
        strategy: str | Mapping[int, int] = "bottleneck",
        first_pass_grad: bool = False,
        layers: Sequence[str] = DEFAULT_LAYERS,
    ) -> None:
        super().__init__()
        self.mapping = feedback_map(config.blocks, strategy)
        self.first_pass_grad = first_pass_grad
        for source, target in self.mapping.items():
            channels = (config.blocks[b].channels for b in (source, target))
            self[str(source)] = _build_layers(layers, *channels)

    @property
    def last_source(self) -> int:
        """The block that the first pass ends with."""
        return max(self.mapping)

    def check_taps(self, blocks: Collection[int]) -> None:
        """Raise a ValueError where a target comes after the last tap: it would not be trained."""
        late = sorted({target for target in self.mapping.values() if target > max(blocks)})
        if late:
            raise ValueError(
                f"feedback into blocks {late} can't reach the taps {sorted(blocks)}; at least one "
                f"tap must be block {late[-1]} or later"
            )

    def forward(
        self,
        unet: DiffusionModel,
        x_t: Tensor,
        t: Tensor | int | float,
        blocks: Collection[int],
        y: Tensor | None = None,
        first_blocks: Collection[int] = (),
    ) -> dict[Any, Tensor]:
        """Outputs of any blocks in the second pass, and of others in the first.

        Args:
            unet: The U-Net, run twice on the same input.
            x_t: See :meth:`DiffusionModel.forward_features`, also for ``t`` and ``y``.
            t: Timesteps.
            blocks: Block numbers (1-based).
            y: Class labels.
            first_blocks: Blocks whose outputs in the first pass are returned too (1-based).

        Returns:
            ``{b: (N, C_b, H/stride_b, W/stride_b)}`` in the order asked for; then
            ``{(b, "first"): ...}``, without gradient unless ``first_pass_grad`` is set.
        """
        wanted = unet.blocks.check(blocks)
        self.check_taps(wanted)
        early = unet.blocks.check(first_blocks) if first_blocks else ()
        end, start = max(wanted), min(self.mapping.values())
        stop = max(self.last_source, *early, 0)
        # Both passes share the blocks up to the first target, whose own output is not yet changed.
        state = unet.start(x_t, t, max(end, stop), y)
        shared = unet.traverse(state, start, [b for b in (*wanted, *early) if b <= start])
        first = unet.fork(state, stop)
        # no_grad and not set_grad_enabled, which torch.export can't save
        with contextlib.nullcontext() if self.first_pass_grad else torch.no_grad():
            features = {**shared, **unet.traverse(first, stop, {*self.mapping, *early})}
        del first
        firsts = {
            (b, "first"): features[b] if self.first_pass_grad else features[b].detach()
            for b in early
        }
        graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if graph and not self.first_pass_grad:
            # Before torch 2.11 the second pass would reuse the first one's casts of the weights,
            # which carry no gradient.
            torch.clear_autocast_cache()
        maps: dict[int, list[Tensor]] = {}
        for source, target in self.mapping.items():
            layers, feature = self[str(source)], features.pop(source)
            like = [*layers.parameters(), feature][0]
            feature = as_type(feature, like.dtype)
            maps.setdefault(target, []).append(layers(feature))
        second = unet.fork(state, end)
        del state
        second.inject(maps.pop(start))
        outputs = shared
        if start in wanted:
            outputs[start] = unet.tap(start, second)
        outputs.update(unet.traverse(second, end, wanted, maps))
        return {**{index: outputs[index] for index in wanted}, **firsts}
