"""Text-free diffusion U-Nets as backbones for detection and segmentation.

The names below need torch alone. ``diffbackbone.mmseg`` registers the backbone with
MMSegmentation and the other OpenMMLab code bases.
"""

from diffbackbone.backbone import DiffusionBackbone
from diffbackbone.checkpoint import CheckpointError, load_checkpoint
from diffbackbone.diffusion import NoiseSchedule
from diffbackbone.feedback import Feedback
from diffbackbone.models.base import BlockInfo
from diffbackbone.models.gd_config import UNetConfig
from diffbackbone.models.guided_diffusion import UNet

__version__ = "0.1.0"

__all__ = [
    "BlockInfo",
    "CheckpointError",
    "DiffusionBackbone",
    "Feedback",
    "NoiseSchedule",
    "UNet",
    "UNetConfig",
    "load_checkpoint",
]
