# A feature pyramid network on four blocks with strides 4, 8, 16 and 32, at the timestep that the
# paper found best for dense taps (Section 4.4). Not in the paper.
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from diffbackbone.detectron2 import DiffusionFPN

from ._base_.coco_10ep import dataloader, lr_multiplier, optimizer, train
from ._base_.mask_rcnn_gd import model

net = model.backbone.net
net.timestep = 90
net.blocks = [30, 27, 24, 21]
model.backbone = L(DiffusionFPN)(
    bottom_up=net, out_channels=256, norm="LN", top_block=L(LastLevelMaxPool)()
)
train.output_dir = "work_dirs/mask_rcnn_gd_t90_multi_py"
