# UperNet on MAE's ViT-B. The settings are those of github.com/implus/mae_segmentation, which
# the paper names (section 7.3) and MMSegmentation ships as configs/mae; the paper found the
# learning rate to be best at its default for batch 2 as well.
_base_ = "./upernet.py"

model = dict(
    # From MAE's https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth, made with
    #   python MMSEG/.mim/tools/model_converters/beit2mmseg.py IN.pth OUT.pth
    # where MMSEG is the folder of the installed mmseg.
    pretrained="./pretrain/mae_pretrain_vit_base_mmcls.pth",
    backbone=dict(
        type="MAE",
        patch_size=16,
        mlp_ratio=4,
        norm_cfg=dict(type="LN", eps=1e-6),
        img_size=(512, 512),
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        drop_path_rate=0.1,
        init_values=1.0,
        out_indices=[3, 5, 7, 11],
    ),
    # transposed convolutions, identity and max pooling, as section 7.3 describes them
    neck=dict(type="Feature2Pyramid", embed_dim=768, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[768, 768, 768, 768], channels=768),
    auxiliary_head=dict(in_channels=768),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LearningRateDecayOptimizerConstructor",
    paramwise_cfg=dict(num_layers=12, decay_rate=0.65, decay_type="layer_wise"),
)
