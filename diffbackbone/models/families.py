"""From a config's words to a network: presets, architectures, models in diffusers' format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffbackbone.models import gd_config
from diffbackbone.models.base import DiffusionModel
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.utils import check_names, require

if TYPE_CHECKING:
    from diffbackbone.models.diffusers import DiffusersConfig

DIFFUSERS = "diffusers://"
"""Start of the addresses of models in diffusers' format."""


def resolve_config(
    unet: str | UNetConfig | Mapping[str, Any] | Any,
) -> UNetConfig | DiffusersConfig:
    """Return the network that a config file or a caller names.

    Args:
        unet: What :func:`diffbackbone.models.gd_config.resolve_config` takes; or
            ``diffusers://<folder or hub id>``, also as ``preset`` of a dict with further fields of
            :class:`diffbackbone.models.diffusers.DiffusersConfig`.

    Raises:
        ValueError: It is something else, or a field is unknown or out of range.
        MissingPackageError: diffusers is not installed.
    """
    if type(getattr(unet, "config", unet)).__name__ == "DiffusersConfig":
        return getattr(unet, "config", unet)
    fields = {"preset": unet} if isinstance(unet, str) else unet
    if not isinstance(fields, Mapping):
        return gd_config.resolve_config(unet)
    source = fields.get("preset")
    if not (isinstance(source, str) and source.startswith(DIFFUSERS)):
        return gd_config.resolve_config(unet)
    require("diffusers://", ["diffusers"], "pip install 'diffbackbone[diffusers]'")
    from diffbackbone.models.diffusers import DiffusersConfig

    options = {name: value for name, value in fields.items() if name != "preset"}
    names = [name for name in DiffusersConfig.__dataclass_fields__ if name != "source"]
    check_names("unet", options, names)
    return DiffusersConfig(source, **options)


def build_network(
    config: UNetConfig | DiffusersConfig,
    last_block: int | None = None,
    activation_checkpointing: bool = False,
    activation_budget: float | None = None,
) -> DiffusionModel:
    """Build a network; one in diffusers' format comes with its weights."""
    kind = UNet if isinstance(config, UNetConfig) else type(config).build
    return kind(config, last_block, activation_checkpointing, activation_budget)


def build_empty(
    config: UNetConfig | DiffusersConfig, last_block: int | None = None
) -> DiffusionModel:
    """Build a network on the meta device: shapes without weights."""
    if not isinstance(config, UNetConfig):
        return config.build_empty(last_block)
    with torch.device("meta"):
        return UNet(config, last_block)
