"""Pretrained networks in diffusers' format: U-Nets, Stable Diffusion, diffusion transformers."""

from diffbackbone.models.diffusers.networks import DiffusersDiT, DiffusersModel, DiffusersUNet
from diffbackbone.models.diffusers.source import DiffusersConfig

__all__ = ["DiffusersConfig", "DiffusersDiT", "DiffusersModel", "DiffusersUNet"]
