# UperNet on MAE's ViT-L. The paper prints UperNet's 1024 channels and that the hyperparameters
# follow ViTDet's for COCO (section 7.3); weight decay, layer decay and drop path are what
# ViTDet's paper gives for ViT-L, and out_indices are those of BEiT-L in MMSegmentation.
_base_ = "./upernet_mae-b.py"

model = dict(
    # from mae_pretrain_vit_large.pth, see upernet_mae-b.py
    pretrained="./pretrain/mae_pretrain_vit_large_mmcls.pth",
    backbone=dict(
        embed_dims=1024,
        num_layers=24,
        num_heads=16,
        drop_path_rate=0.4,
        out_indices=[7, 11, 15, 23],
    ),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024], channels=1024),
    auxiliary_head=dict(in_channels=1024),
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.1),
    paramwise_cfg=dict(num_layers=24, decay_rate=0.8),
)
