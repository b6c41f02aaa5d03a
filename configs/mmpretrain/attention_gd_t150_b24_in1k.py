# Attention head on the frozen U-Net, t=150, b=24, as Section 4 sets it up for ImageNet-1k: images
# of 256 px cropped at the centre and flipped, cross entropy, Adam, 28 epochs, a tenth of the
# learning rate every 7. Neither learning rate nor batch is printed; these are ours.
custom_imports = dict(imports=["diffbackbone.mmpretrain"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(
        num_classes=1000, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True
    ),
    backbone=dict(
        type="DiffusionTaps",
        unet="gd256_uncond",
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
            "256x256_diffusion_uncond.pt",
        ),
        timesteps=[150],
        blocks=[24],
        freeze=True,
    ),
    head=dict(
        type="DiffusionHead",
        head="attention",
        in_channels=1024,
        num_classes=1000,
        size=16,  # 256 px at stride 16
        layers=2,
        topk=(1, 5),
    ),
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=256, edge="short", backend="pillow"),
    dict(type="CenterCrop", crop_size=256),
    dict(type="PackInputs"),
]
flip = dict(type="RandomFlip", prob=0.5, direction="horizontal")
train_pipeline = [*test_pipeline[:3], flip, test_pipeline[3]]
data = dict(type="ImageNet", data_root="data/imagenet")
loader = dict(batch_size=16, num_workers=5)
train_dataloader = dict(
    dataset=dict(**data, split="train", pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
    **loader,
)
val_dataloader = dict(
    dataset=dict(**data, split="val", pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
    **loader,
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(type="Adam", lr=1e-4))
param_scheduler = dict(type="StepLR", by_epoch=True, step_size=7, gamma=0.1)
train_cfg = dict(by_epoch=True, max_epochs=28, val_interval=1)
val_cfg = dict()
test_cfg = dict()

default_scope = "mmpretrain"
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=100),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="WholeCheckpointHook", interval=1, max_keep_ckpts=2, save_best="auto"),
    check_loss=dict(type="CheckLossHook"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
log_level = "INFO"
randomness = dict(seed=0, deterministic=False)
