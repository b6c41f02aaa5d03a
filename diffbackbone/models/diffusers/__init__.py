"""Pretrained networks in diffusers' format: U-Nets, Stable Diffusion, diffusion transformers."""

from __future__ import annotations

from typing import Any

from diffbackbone.utils import check_names, require

require("diffusers://", ["diffusers"], "pip install 'diffbackbone[diffusers]'")

from diffbackbone.models.diffusers.dit import DiffusersDiT  # noqa: E402
from diffbackbone.models.diffusers.model import DiffusersModel  # noqa: E402
from diffbackbone.models.diffusers.source import DiffusersConfig  # noqa: E402
from diffbackbone.models.diffusers.unet import DiffusersUNet  # noqa: E402

__all__ = ["DiffusersConfig", "DiffusersDiT", "DiffusersModel", "DiffusersUNet", "resolve"]


def resolve(name: str, **fields: Any) -> DiffusersConfig:
    """Return the configuration of a folder or an id on the Hugging Face Hub.

    Raises:
        ValueError: There is no such field.
    """
    allowed = [field for field in DiffusersConfig.__dataclass_fields__ if field != "source"]
    check_names("unet", fields, allowed)
    return DiffusersConfig(name, **fields)
