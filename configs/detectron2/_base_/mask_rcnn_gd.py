# The Python twin of mask_rcnn_gd.yaml.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from diffbackbone.detectron2 import (
    PIXEL_MEAN,
    PIXEL_STD,
    DiffusionBackbone,
    DiffusionSimpleFeaturePyramid,
)
from diffbackbone.sources import RELEASED_CHECKPOINTS

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model  # for its heads
model.pixel_mean = list(PIXEL_MEAN)
model.pixel_std = list(PIXEL_STD)
model.backbone = L(DiffusionSimpleFeaturePyramid)(
    net=L(DiffusionBackbone)(
        unet="gd256_uncond",
        checkpoint=RELEASED_CHECKPOINTS["gd256_uncond"],
        timestep=75,
        blocks=[24],
        feedback=None,
        activation_checkpointing=True,
    ),
    out_channels=256,
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
)
