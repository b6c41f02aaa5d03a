# Mask R-CNN on GD, t=75, b=24, in MMDetection: data, schedule and learning rate are those of
# configs/detectron2/mask_rcnn_gd_t75_b24.yaml (Section 7.2), neck and heads are MMDetection's.
# ViTDet's simple pyramid is no part of its package: block 24 is resized to four strides instead,
# and a feature pyramid network follows.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["diffbackbone.mmdet"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(  # RGB in [-1, 1], what the U-Net was trained on
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_size_divisor=1,  # the backbone pads inside
    ),
    backbone=dict(
        _delete_=True,
        type="DiffusionBackbone",
        unet="gd256_uncond",
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
            "256x256_diffusion_uncond.pt",
        ),
        timestep=75,
        blocks=[24, 24, 24, 24],
        out_channels=256,
        out_strides=[4, 8, 16, 32],
        activation_checkpointing=True,
    ),
    neck=dict(in_channels=[256, 256, 256, 256]),
)

image_size = (1024, 1024)
train_pipeline = [  # large-scale jitter
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=image_size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type="RandomCrop",
        crop_type="absolute_range",
        crop_size=image_size,
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=train_pipeline))  # on each of 4 GPUs
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=10, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    constructor="DiffusionOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=2.5e-5, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(layer_decay_rate=0.8, norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(  # at 8/9 and 26/27 of the way
        type="MultiStepLR", by_epoch=False, begin=0, end=295000, milestones=[262222, 284074]
    ),
]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
randomness = dict(seed=0)
