"""What all networks of diffusers share: modules, names and the autoencoder are diffusers' own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import GaussianFourierProjection
from torch import Tensor, nn

from diffbackbone.models.base import BlockInfo, BlockTable, DiffusionModel
from diffbackbone.models.ops import autocasts


class Condition(NamedTuple):
    """What the blocks of a network read beside the maps."""

    emb: Tensor | None  # of timestep, label and pooled text (N or 1, E)
    tokens: Tensor | None = None  # of text (1, L, C), for cross-attention
    t: Tensor | None = None  # timesteps (N or 1,), for DiT, whose blocks embed them themselves
    y: Tensor | None = None  # class labels (N or 1,), likewise


class DiffusersModel(DiffusionModel):
    """Base of the networks in diffusers' format.

    Args:
        net: diffusers' network, which is changed: what no block needs is removed.
        vae: Autoencoder, of which the encoder is kept and stays as it is; None for a network of
            images.
        blocks: The table of all blocks.
        modules: The blocks' modules, in the same order.
        **options: See :class:`DiffusionModel`.
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
        **options: Any,
    ) -> None:
        super().__init__(blocks, **options)
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
            mean = latents.new_tensor(config.latents_mean)[:, None, None]
            std = latents.new_tensor(config.latents_std)[:, None, None]
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
        weight = next(self.net.parameters())
        stride, cond = self.input_stride, self.embed(0, None, weight.device)
        options = {"device": weight.device, "dtype": weight.dtype, "requires_grad": True}
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
