# The paper's detector (Section 4.5, Figure 8): GD, t=75, b=24.
from ._base_.coco_10ep import dataloader, lr_multiplier, optimizer, train
from ._base_.mask_rcnn_gd import model

train.output_dir = "work_dirs/mask_rcnn_gd_t75_b24_py"
