"""Detectron2 adapter: backbones, configs, data and training.

YAML configs name a builder and set keys that :func:`add_diffusion_config` adds to ``get_cfg()``;
Python configs take the classes, ``L(DiffusionSimpleFeaturePyramid)(net=L(DiffusionBackbone)())``.
Importing this package also registers the sample data by name.
"""

# ruff: noqa: E402
from diffbackbone.utils import require

require(
    "Detectron2",
    ("detectron2", "fvcore", "iopath", "omegaconf", "pkg_resources", "pycocotools", "shapely"),
    "pip install 'diffbackbone[detectron2]'; Detectron2 itself is not on PyPI, see "
    "https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)

from diffbackbone.detectron2.backbone import (
    DiffusionBackbone,
    DiffusionFPN,
    DiffusionSimpleFeaturePyramid,
)
from diffbackbone.detectron2.config import (
    PIXEL_MEAN,
    PIXEL_STD,
    add_diffusion_config,
    build_diffusion_backbone,
    build_diffusion_fpn_backbone,
    build_diffusion_sfp_backbone,
    load_yaml,
)
from diffbackbone.detectron2.datasets import (
    SAMPLE_ROOT,
    build_train_loader,
    large_scale_jitter,
    register_sample_data,
)
from diffbackbone.detectron2.solver import get_optimizer_params

__all__ = [
    "PIXEL_MEAN", "PIXEL_STD", "SAMPLE_ROOT", "DiffusionBackbone", "DiffusionFPN",
    "DiffusionSimpleFeaturePyramid", "add_diffusion_config", "build_diffusion_backbone",
    "build_diffusion_fpn_backbone", "build_diffusion_sfp_backbone", "build_train_loader",
    "get_optimizer_params", "large_scale_jitter", "load_yaml", "register_sample_data",
]  # fmt: skip
