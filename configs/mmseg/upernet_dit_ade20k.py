# DiT-XL/2-256 (t=90, null class): all blocks have stride 16.
_base_ = ["./_base_/upernet_gd.py", "./_base_/ade20k.py", "./_base_/schedule_16k.py"]

model = dict(
    backbone=dict(
        unet="diffusers://facebook/DiT-XL-2-256",
        init_cfg=None,  # its own weights
        blocks=[7, 14, 21, 28],
    )
)
