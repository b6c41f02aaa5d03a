# The Python twin of coco_10ep.yaml: data, schedule, optimizer, trainer. Detectron2's own
# tools/lazyconfig_train_net.py trains it as well as ours.
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from diffbackbone.detectron2 import (
    build_train_loader,
    get_optimizer_params,
    large_scale_jitter,
)

IMAGE_SIZE = 1024

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train = L(build_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
    mapper=L(DatasetMapper)(
        is_train=True,
        augmentations=L(large_scale_jitter)(size=IMAGE_SIZE),
        image_format="RGB",
        use_instance_mask=True,
        recompute_boxes=True,  # crops cut instances
    ),
    total_batch_size=4,
    num_workers=8,
    seed=0,
)
dataloader.test.mapper.augmentations[0].short_edge_length = IMAGE_SIZE
dataloader.test.mapper.augmentations[0].max_size = IMAGE_SIZE

train = model_zoo.get_config("common/train.py").train
train.max_iter = 295000  # 10 epochs at batch 4
train.eval_period = 29500
train.checkpointer.max_to_keep = 2
train.device = "cuda" if torch.cuda.is_available() else "cpu"
train.amp.enabled = torch.cuda.is_available()
train.amp.dtype = "auto"  # read by our script; Detectron2's takes float16

lr_multiplier = L(WarmupParamScheduler)(  # another train.max_iter stretches or shrinks it
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[262222, 284074], num_updates=295000
    ),
    warmup_length=250 / 295000,
    warmup_factor=0.001,
)

optimizer = L(torch.optim.AdamW)(
    params=L(get_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0, layer_decay_rate=0.8),
    lr=2.5e-5,
    betas=(0.9, 0.999),
    weight_decay=0.1,
)
