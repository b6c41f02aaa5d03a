# DifFeed (Section 3.3) in the paper's detection setting. Not in the paper, which has plain GD only.
from ._base_.coco_10ep import dataloader, lr_multiplier, optimizer, train
from ._base_.mask_rcnn_gd import model

model.backbone.net.feedback = "bottleneck"
train.output_dir = "work_dirs/mask_rcnn_difffeed_py"
