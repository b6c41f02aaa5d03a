"""Detectron2 adapter: the backbone, its pyramids, configs, data and training.

YAML configs name a builder and set keys that :func:`add_diffusion_config` adds::

    from detectron2.config import get_cfg
    from diffbackbone.detectron2 import add_diffusion_config

    cfg = get_cfg()
    add_diffusion_config(cfg)
    cfg.merge_from_file("configs/detectron2/mask_rcnn_gd_t75_b24.yaml")

Python configs take the classes, ``L(DiffusionSimpleFeaturePyramid)(net=L(DiffusionBackbone)())``.
Importing this package also registers the sample data by name (:data:`SAMPLE_DATASETS`).
"""

from diffbackbone import compat

compat.check_detectron2_stack()

from diffbackbone.detectron2.backbone import *  # noqa: E402, F403
