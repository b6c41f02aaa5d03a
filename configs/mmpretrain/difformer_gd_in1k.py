# DifFormer on three timesteps and three blocks of the frozen U-Net (Section 3.2, Tables 1, 3, 15).
_base_ = "attention_gd_t150_b24_in1k.py"

timesteps = [90, 150, 300]
blocks = [19, 24, 30]
model = dict(
    backbone=dict(timesteps=timesteps, blocks=blocks),
    head=dict(
        _delete_=True,
        type="DiffusionHead",
        head="difformer",
        in_channels=[1024, 1024, 512],
        num_classes=1000,
        sizes=[8, 16, 16],  # 256 px at strides 32, 16 and 4, pooled to at most 16
        timesteps=timesteps,
        blocks=blocks,
        layers=2,
        topk=(1, 5),
    ),
)
