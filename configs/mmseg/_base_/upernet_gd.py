# UperNet on the 256-px unconditional guided-diffusion U-Net, fine-tuned as sections 4.4 and 7.3 of
# the paper describe it: t=90, 1x1 convolutions to 1024 channels, bilinear resizing to the strides
# that MAE's ViT-L hands to UperNet, UperNet 1024 channels wide, learning rate 2e-5.
# The paper prints neither weight decay nor the auxiliary head; they are those of its MAE settings.
_base_ = "./upernet.py"

model = dict(
    # RGB in [-1, 1], what the U-Net was trained on
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        type="DiffusionBackbone",
        unet="gd256_uncond",
        # Downloaded on first use; a local file serves as well:
        #   --cfg-options model.backbone.init_cfg.checkpoint=256x256_diffusion_uncond.pt
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
            "256x256_diffusion_uncond.pt",
        ),
        timestep=90,
        blocks=[33, 30, 27, 24],
        out_channels=1024,
        out_strides=[4, 8, 16, 32],
        noise="fixed",
        activation_checkpointing=True,  # less memory for more time
    ),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024], channels=1024),
    auxiliary_head=dict(in_channels=1024),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

custom_hooks = [dict(type="CheckInputsHook")]

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-5, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="DiffusionOptimWrapperConstructor",
    # layer_decay_rate=0.9, say, lowers the learning rate of the U-Net's early blocks
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
