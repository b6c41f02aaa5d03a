"""The networks: one file for each family, one interface.

A configuration offers ``blocks``, ``num_classes``, ``noise_schedule``, ``image_size``, ``replace``
and ``build``.
"""

from __future__ import annotations

import importlib
from typing import Any

from diffbackbone.models.base import DiffusionModel
from diffbackbone.models.classifier import CLASSIFIERS
from diffbackbone.models.gd_config import UNetConfig, config_fields, resolve_config
from diffbackbone.models.guided_diffusion import UNet

FAMILIES = {
    "timm:": "diffbackbone.models.timm",
    "diffusers://": "diffbackbone.models.diffusers",
}
"""Modules with a function ``resolve(name, **fields)``, imported on demand, by the names' prefix."""


def resolve_network(unet: Any) -> Any:
    """Return the configuration of a network of any family.

    Args:
        unet: A name (``"gd256_uncond"``, ``"gd256_classifier"``, ``"timm:resnet50"``,
            ``"diffusers://<folder or hub id>"``), a configuration, a dict of its fields (``preset``
            is the name to start from), such a dict as JSON, or anything that has a configuration
            as ``config``.

    Raises:
        ValueError: It is something else, or a field is unknown or out of range.
        MissingPackageError: The family's package is not installed.
    """
    config = getattr(unet, "config", unet)
    if hasattr(config, "build") or isinstance(config, UNetConfig):
        return config
    fields = config_fields(unet)
    name = fields.get("preset")
    if isinstance(name, str):
        del fields["preset"]
        if name in CLASSIFIERS:
            return CLASSIFIERS[name].replace(**fields)
        for prefix, module in FAMILIES.items():
            if name.startswith(prefix):
                family = importlib.import_module(module)
                return family.resolve(name.removeprefix(prefix), **fields)
    return resolve_config(unet)


def build_network(
    config: Any,
    last_block: int | None = None,
    activation_checkpointing: bool = False,
    activation_budget: float | None = None,
    pretrained: bool = False,
) -> DiffusionModel:
    """Build the network of a configuration of any family.

    Args:
        config: The configuration.
        last_block: See :class:`DiffusionModel`, as for the next two.
        activation_checkpointing: Recompute blocks in the backward pass.
        activation_budget: GB of activations to keep.
        pretrained: Load the weights that the name stands for, where it stands for any.
    """
    options = {
        "last_block": last_block,
        "activation_checkpointing": activation_checkpointing,
        "activation_budget": activation_budget,
    }
    if type(config) is UNetConfig:
        return UNet(config, **options)
    return config.build(pretrained, **options)
