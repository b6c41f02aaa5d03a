"""Networks of diffusers, run block by block: U-Nets and DiT, with or without an autoencoder.

The modules are diffusers' own; a block calls them one after the other as diffusers' forward pass
does. Names in the state dict are diffusers' behind ``net.`` and ``vae.``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import GaussianFourierProjection
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from diffbackbone.models.base import BlockInfo, BlockTable, DiffusionModel, TraversalState
from diffbackbone.models.ops import autocasts, is_readable

UNET_BLOCKS = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "CrossAttnDownBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "UNetMidBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2DSimpleCrossAttn",
    "UpBlock2D",
    "AttnUpBlock2D",
    "ResnetUpsampleBlock2D",
    "CrossAttnUpBlock2D",
    "SimpleCrossAttnUpBlock2D",
)
"""Kinds of levels that are supported: one skip for each residual block and downsampler."""


class Condition(NamedTuple):
    """What the blocks of a network read beside the maps.

    Attributes:
        emb: Embedding of timestep, label and pooled text (N or 1, E).
        tokens: Text tokens (1, L, C) for cross-attention, or None.
        t: Timesteps (N or 1,), for DiT, whose blocks embed them themselves.
        y: Class labels (N or 1,), likewise.
    """

    emb: Tensor | None
    tokens: Tensor | None = None
    t: Tensor | None = None
    y: Tensor | None = None


class Block(nn.Module):
    """Layers of one block of a U-Net, in the order in which they run.

    Args:
        layers: diffusers' modules, which stay part of the network.
        crosses: Whether attention layers read the text tokens.
        centers: Map the input from [0, 1] to [-1, 1] first (``center_input_sample``).
    """

    def __init__(
        self, layers: list[nn.Module], crosses: bool = False, centers: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.crosses = crosses
        self.centers = centers

    def forward(self, h: Tensor, cond: Condition) -> Tensor:
        """(N, C_in, H, W) and a condition to (N, C, H', W')."""
        h = 2 * h - 1 if self.centers else h
        for layer in self.layers:
            tokens = {}
            if self.crosses and isinstance(
                layer, (Attention, Transformer2DModel, DualTransformer2DModel)
            ):
                tokens["encoder_hidden_states"] = cond.tokens.expand(len(h), -1, -1)
            if isinstance(layer, ResnetBlock2D):
                h = layer(h, cond.emb)
            elif isinstance(layer, (Transformer2DModel, DualTransformer2DModel)):
                h = layer(h, **tokens, return_dict=False)[0]
            else:
                h = layer(h, **tokens)
        return h


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


class DiffusersModel(DiffusionModel):
    """Base of the networks in diffusers' format.

    Args:
        net: diffusers' network, which is changed: what no block needs is removed.
        vae: Autoencoder, of which the encoder is kept and stays as it is; None for a network of
            images.
        blocks: The table of all blocks.
        modules: The blocks' modules, in the same order.
        last_block: See :class:`DiffusionModel`, as for the other two.
        activation_checkpointing: Recompute blocks in the backward pass.
        activation_budget: GB of activations to keep.

    Attributes:
        full_shapes: Shapes of all weights by their names, removed ones included.
    """

    channels_last = False  # torch's group norm is inaccurate for it
    labels_optional = True
    config: Any = None  # the DiffusersConfig, for a network that was read from a source

    def __init__(
        self,
        net: nn.Module,
        vae: nn.Module | None,
        blocks: BlockTable,
        modules: list[nn.Module],
        last_block: int | None,
        activation_checkpointing: bool,
        activation_budget: float | None,
    ) -> None:
        super().__init__(blocks, last_block, activation_checkpointing, activation_budget)
        self.full_shapes = {f"net.{name}": tuple(x.shape) for name, x in net.state_dict().items()}
        self.net = net
        self.in_channels = (net if vae is None else vae).config.in_channels
        self.vae = vae
        self.input_stride = 1
        if vae is not None:
            self.input_stride = vae_stride(vae)
            for name in ("decoder", "post_quant_conv", "quantize"):
                if hasattr(vae, name):
                    delattr(vae, name)
        # not registered, since these modules are already part of the network
        self._steps = tuple(modules[: self.last_block])
        self._remove(modules[self.last_block :])

    def _remove(self, modules: list[nn.Module]) -> None:
        """Remove blocks from the end of the network."""
        layers = {layer for module in modules for layer in module.modules()}
        for parent in list(self.net.modules()):
            for name, child in list(parent.named_children()):
                if child in layers and parent not in layers:
                    delattr(parent, name)

    def convert(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Complete the weights of a network alone, such as CleanDIFT's, by all others' values."""
        others = {n: x for n, x in self.state_dict().items() if not n.startswith("net.")}
        self.full_shapes.update({name: tuple(x.shape) for name, x in others.items()})
        return {**others, **{f"net.{name}": x for name, x in weights.items()}}

    def module(self, index: int) -> nn.Module:
        """Return the module of a block (1-based)."""
        return self._steps[index - 1]

    @property
    def noise_schedule(self) -> str | tuple[float, ...]:
        """The source's schedule; linear for a network that was built from diffusers' modules."""
        return "linear" if self.config is None else self.config.noise_schedule

    @property
    def weights_dtype(self) -> torch.dtype:
        """Type of the network's weights."""
        return next(self.net.parameters()).dtype

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the weights; an autoencoder stays in float32 for float16, which it overflows."""
        self.net.to(dtype)
        if self.vae is not None and dtype != torch.float16:
            self.vae.to(dtype)

    def train(self, mode: bool = True) -> DiffusersModel:
        """Set training mode; the autoencoder stays in evaluation mode."""
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> DiffusersModel:
        """Turn gradients on or off; fixed frequencies and the autoencoder never get any."""
        super().requires_grad_(requires_grad)
        frozen = [m for m in self.modules() if isinstance(m, GaussianFourierProjection)]
        for module in (*frozen, self.vae):
            if module is not None:
                module.requires_grad_(False)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents that noise is added to: the encoder's mean, scaled.

        Args:
            images: (N, 3, H, W) in [-1, 1]; H and W multiples of the autoencoder's stride.

        Returns:
            (N, C, H/8, W/8) for Stable Diffusion; the images where there is no autoencoder.
        """
        if self.vae is None:
            return images
        config, device = self.vae.config, images.device.type
        precision: Any = contextlib.nullcontext()
        if autocasts(images) and torch.get_autocast_dtype(device) == torch.float16:
            precision = torch.autocast(device, enabled=False)  # float16 would overflow
        with torch.no_grad(), precision:
            found = self.vae.encode(images.to(next(self.vae.parameters()).dtype))
            latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        latents = latents.to(images.dtype)
        if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
            mean, std = (
                latents.new_tensor(values)[:, None, None]
                for values in (config.latents_mean, config.latents_std)
            )
            return (latents - mean) * config.scaling_factor / std
        return (latents - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor

    def _recomputed_blocks(self, x_t: Tensor, last: int) -> frozenset[int]:
        """Count what blocks keep when it is first asked for; see the base class."""
        counted = any(info.kept_values for info in self.blocks.values())
        if self.activation_budget is not None and not counted:
            self.blocks = BlockTable(self._count_kept())
        return super()._recomputed_blocks(x_t, last)

    def _count_kept(self) -> Iterator[BlockInfo]:
        """Run each block once on a small map and count the values that autograd saves."""
        side = 2 * self.blocks.deepest_stride(len(self.blocks))
        stride, cond = self.input_stride, self.embed(0, None, self.device)
        options = {"device": self.device, "dtype": self.weights_dtype, "requires_grad": True}
        for index, info in self.blocks.items():
            if index <= self.last_block:
                x = torch.zeros(1, info.in_channels, side // stride, side // stride, **options)
                info = dataclasses.replace(
                    info,
                    kept_values=_count_saved(self.module(index), x, cond) / side**2,
                    read_values=info.in_channels / stride**2,
                )
            yield info
            stride = info.stride

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    def check_labels(self, y: Tensor | None, count: int) -> None:
        """Check class labels, which may be left out.

        Raises:
            ValueError: They are not wanted, out of range or not one for each image.
        """
        if y is None:
            return
        if not self.takes_labels:
            raise ValueError("labels y were given, but this network is not class-conditional")
        if y.shape[0] != count:
            raise ValueError(f"labels y must be one for each of {count} images, got {len(y)}")
        if self.num_classes is not None and is_readable(y):
            low, high = torch.stack(torch.aminmax(y)).tolist()
            if y.ndim != 1 or low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels y must lie in 0..{self.num_classes - 1}, got {tuple(y.shape)} from "
                    f"{low} to {high}"
                )

    @property
    def takes_labels(self) -> bool:
        """Whether the network has a class embedding."""
        return True


def _count_saved(module: nn.Module, x: Tensor, cond: Condition) -> int:
    """Count the values, weights aside, that a module saves for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        saved[value.untyped_storage().data_ptr()] = value
        return value

    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module(x, cond)
    sizes = {p: x.untyped_storage().nbytes() // x.element_size() for p, x in saved.items()}
    return sum(size for p, size in sizes.items() if p not in weights)


def vae_stride(vae: nn.Module) -> int:
    """Return the stride of an autoencoder's latents, 8 in Stable Diffusion."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def as_timesteps(t: Tensor | int | float, device: torch.device | None) -> Tensor:
    """Return timesteps (N,) or (1,)."""
    return torch.as_tensor(t, device=device).reshape(-1)


class DiffusersUNet(DiffusersModel):
    """``UNet2DModel`` and ``UNet2DConditionModel``.

    Blocks are numbered as in guided-diffusion: ``conv_in``, each residual block of the encoder with
    its attention, and each downsampler are a block each; the middle is one; each residual block of
    the decoder is one, the last of a level with its upsampler. Stable Diffusion 1.5 has 25.

    Args:
        net: See :class:`DiffusersModel`.
        vae: See :class:`DiffusersModel`.
        tokens: Text tokens (1, L, C) that cross-attention reads, where there is cross-attention.
        pooled: Pooled text embedding (1, C) where the network reads one (SDXL).
        learned: Train the tokens.
        last_block: See :class:`DiffusersModel`.
        activation_checkpointing: See :class:`DiffusersModel`.
        activation_budget: See :class:`DiffusersModel`.

    Raises:
        ValueError: The network has levels of another kind than :data:`UNET_BLOCKS`.
    """

    anchor = "time_embedding.linear_1.weight"

    def __init__(
        self,
        net: UNet2DModel | UNet2DConditionModel,
        vae: nn.Module | None = None,
        tokens: Tensor | None = None,
        pooled: Tensor | None = None,
        learned: bool = False,
        last_block: int | None = None,
        activation_checkpointing: bool = False,
        activation_budget: float | None = None,
    ) -> None:
        rows = list(_unet_blocks(net, 1 if vae is None else vae_stride(vae)))
        super().__init__(
            net,
            vae,
            BlockTable(info for info, _ in rows),
            [module for _, module in rows],
            last_block,
            activation_checkpointing,
            activation_budget,
        )
        if net.config.class_embed_type is None:
            self.num_classes = net.config.num_class_embeds
        for name in ("conv_norm_out", "conv_act", "conv_out", "position_net"):
            if hasattr(net, name):
                delattr(net, name)
        net.time_embedding.cond_proj = None  # of guidance scales, which features have none of
        self.learned = ("tokens",) if learned else ()
        self.tokens: Tensor | None
        self.pooled: Tensor | None
        self.register_buffer("pooled", pooled)
        if learned:
            self.tokens = nn.Parameter(tokens)
        else:
            self.register_buffer("tokens", tokens)

    @property
    def takes_labels(self) -> bool:
        """Whether the network has a class embedding."""
        return self.net.class_embedding is not None

    def idle_modules(self, labeled: bool) -> Iterator[nn.Module]:
        """Yield modules that a run without labels doesn't use."""
        if self.takes_labels and not labeled:
            yield self.net.class_embedding

    def embed(
        self,
        t: Tensor | int | float,
        y: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Condition:
        """Return the embeddings of timestep, labels and text that the blocks read."""
        net, dtype = self.net, self.weights_dtype
        emb = net.time_embedding(net.time_proj(as_timesteps(t, device)).to(dtype))
        if y is not None:
            if net.config.class_embed_type == "timestep":
                y = net.time_proj(y)
            if y.is_floating_point():
                y = y.to(dtype)
            label = net.class_embedding(y).to(dtype)
        if isinstance(net, UNet2DModel):
            return Condition(emb if y is None else emb + label)
        if net.config.class_embeddings_concat:
            label = torch.zeros_like(emb) if y is None else label
            emb = torch.cat([emb.expand(len(label), -1), label], dim=-1)
        elif y is not None:
            emb = emb + label
        tokens = None if self.tokens is None else self.tokens.to(dtype)
        added = self._added(dtype)
        extra = net.get_aug_embed(emb, tokens, added)
        emb = emb if extra is None else emb + extra
        if net.time_embed_act is not None:
            emb = net.time_embed_act(emb)
        return Condition(emb, net.process_encoder_hidden_states(tokens, added))

    def _added(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return SDXL's pooled text and sizes: those that the network was trained at, no crop."""
        if self.pooled is None:
            return {}
        config = self.net.config
        numbers = config.projection_class_embeddings_input_dim - self.pooled.shape[-1]
        side = self.net.sample_size * self.input_stride
        sizes = [side, side, 0, 0, side, side]
        if numbers // config.addition_time_embed_dim == 5:  # SDXL's refiner: an aesthetic score
            sizes[4:] = [6]
        return {
            "text_embeds": self.pooled.to(dtype),
            "time_ids": torch.tensor([sizes], dtype=torch.float32, device=self.pooled.device),
        }


def _unet_blocks(net: nn.Module, stride: int) -> Iterator[tuple[BlockInfo, Block]]:
    """Yield the blocks of a U-Net whose input has the given stride."""
    for level in (*net.down_blocks, net.mid_block, *net.up_blocks):
        if level is not None and type(level).__name__ not in UNET_BLOCKS:
            raise ValueError(
                f"U-Nets with {type(level).__name__} are not supported; levels may be "
                f"{', '.join(UNET_BLOCKS)}"
            )
    index, channels = 0, net.conv_in.in_channels

    def block(
        part: str,
        name: str,
        layers: list[nn.Module],
        level: nn.Module | None = None,
        resample: str | None = None,
    ) -> tuple[BlockInfo, Block]:
        nonlocal index, channels, stride
        index += 1
        stride = {"down": 2 * stride, "up": stride // 2, None: stride}[resample]
        read = getattr(layers[0], "in_channels", channels)
        convs = [x for x in layers if hasattr(x, "out_channels")]  # all but attention
        channels = convs[-1].out_channels
        attention = any(
            isinstance(x, (Attention, Transformer2DModel, DualTransformer2DModel)) for x in layers
        )
        info = BlockInfo(
            index, channels, stride, name, read, attention, resample=resample, part=part
        )
        crosses = getattr(level, "has_cross_attention", False)
        return info, Block(layers, crosses, index == 1 and net.config.center_input_sample)

    def residual(level: nn.Module, i: int) -> list[nn.Module]:
        attentions = getattr(level, "attentions", None)
        return [level.resnets[i], attentions[i]] if attentions else [level.resnets[i]]

    yield block("encoder", "conv_in", [net.conv_in])
    for n, level in enumerate(net.down_blocks):
        for i in range(len(level.resnets)):
            yield block("encoder", f"down_blocks.{n}.resnets.{i}", residual(level, i), level)
        if level.downsamplers is not None:
            name = f"down_blocks.{n}.downsamplers.0"
            yield block("encoder", name, list(level.downsamplers), resample="down")
    if net.mid_block is not None:
        level = net.mid_block
        layers = [level.resnets[0]]
        for attention, resnet in zip(level.attentions, level.resnets[1:]):
            layers += [resnet] if attention is None else [attention, resnet]
        yield block("middle", "mid_block", layers, level)
    for n, level in enumerate(net.up_blocks):
        for i in range(len(level.resnets)):
            layers, resample = residual(level, i), None
            if i == len(level.resnets) - 1 and level.upsamplers is not None:
                layers, resample = [*layers, *level.upsamplers], "up"
            yield block("decoder", f"up_blocks.{n}.resnets.{i}", layers, level, resample)


class DiffusersDiT(DiffusersModel):
    """``DiTTransformer2DModel``: block b is transformer block b, and maps are its tokens.

    Taps are normalized: by the layer norm and the modulation of the block itself, since a few
    channels of the raw ones are hundreds of times as large as all others.

    Args:
        net: See :class:`DiffusersModel`.
        vae: See :class:`DiffusersModel`.
        raw: Tap the blocks' outputs as they are.
        last_block: See :class:`DiffusersModel`.
        activation_checkpointing: See :class:`DiffusersModel`.
        activation_budget: See :class:`DiffusersModel`.
    """

    anchor = "pos_embed.proj.weight"

    def __init__(
        self,
        net: DiTTransformer2DModel,
        vae: nn.Module | None = None,
        raw: bool = False,
        last_block: int | None = None,
        activation_checkpointing: bool = False,
        activation_budget: float | None = None,
    ) -> None:
        stride = net.config.patch_size * (1 if vae is None else vae_stride(vae))
        width = net.inner_dim
        blocks = BlockTable(
            BlockInfo(
                index,
                width,
                stride,
                f"transformer_blocks.{index - 1}",
                width,
                attention=True,
                part="transformer",
            )
            for index in range(1, len(net.transformer_blocks) + 1)
        )
        modules = [
            DiTBlock(block, net.pos_embed if i == 0 else None)
            for i, block in enumerate(net.transformer_blocks)
        ]
        super().__init__(
            net, vae, blocks, modules, last_block, activation_checkpointing, activation_budget
        )
        self.raw = raw
        self.num_classes = net.config.num_embeds_ada_norm
        for name in ("norm_out", "proj_out_1", "proj_out_2"):
            delattr(net, name)
        for block in net.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = (
                0  # labels are dropped by leaving them out
            )

    def embed(
        self,
        t: Tensor | int | float,
        y: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Condition:
        """Return timesteps and labels, which each block embeds; no label is a class of its own."""
        t = as_timesteps(t, device)
        if y is None:
            y = torch.full((1,), self.num_classes, device=t.device)
        return Condition(None, t=t, y=y)

    def tap(self, index: int, state: TraversalState) -> Tensor:
        """Return the output of a block, normalized unless raw ones were asked for."""
        return state.h if self.raw else self.module(index).modulate(state.h, state.emb)
