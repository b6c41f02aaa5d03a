# UperNet on a small U-Net, pretrained on unlabelled scenes and fine-tuned on the sample data:
# minutes on a CPU.
# The U-Net has the blocks of the 256-px model, so everything carries over to it.
_base_ = ["./_base_/upernet_gd.py", "./_base_/sample_data.py", "./_base_/schedule_16k.py"]

norm_cfg = dict(type="BN", requires_grad=True)
# Heads start from random weights and have minutes: the classifiers start ten times
# larger than MMSegmentation's 0.01 and without dropout, or they first learn "background" for long.
head = dict(
    num_classes=11,
    norm_cfg=norm_cfg,
    dropout_ratio=0.0,
    init_cfg=dict(type="Normal", std=0.1, override=dict(name="conv_seg")),
)
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(
        unet="tiny",
        init_cfg=dict(checkpoint="diffbackbone://tiny.safetensors"),  # None for random ones
        out_channels=64,
        out_strides=[2, 4, 8, 16],  # scenes are an eighth of ADE20K's, strides half
        activation_checkpointing=False,
    ),
    decode_head=dict(in_channels=[64, 64, 64, 64], channels=64, **head),
    auxiliary_head=dict(in_channels=64, channels=64, **head),
    test_cfg=dict(_delete_=True, mode="whole"),
)

max_iters = 400
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 2)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=max_iters // 4, save_best=None),
)
randomness = dict(seed=0)
