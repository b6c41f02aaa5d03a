# MAE's ViT-L that the paper compares with (Figure 8): Detectron2's ViTDet-L, 10 epochs at batch 4.
# It needs timm.
from functools import partial

from detectron2 import model_zoo
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

from ._base_.coco_10ep import dataloader, lr_multiplier, optimizer, train

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.backbone.net.embed_dim = 1024
model.backbone.net.depth = 24
model.backbone.net.num_heads = 16
model.backbone.net.drop_path_rate = 0.4
# global attention in blocks 5, 11, 17 and 23
model.backbone.net.window_block_indexes = [b for b in range(24) if b % 6 != 5]

optimizer.params.pop("layer_decay_rate")
optimizer.params._target_ = "detectron2.solver.build.get_default_optimizer_params"
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, lr_decay_rate=0.8, num_layers=24)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
train.init_checkpoint = (
    "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_large.pth?matching_heuristics=True"
)
train.output_dir = "work_dirs/mask_rcnn_vitdet_l_mae"
