# Stable Diffusion 1.5 (t=90, empty prompt), as GD's settings; Table 10 probes its features.
_base_ = ["./_base_/upernet_gd.py", "./_base_/ade20k.py", "./_base_/schedule_16k.py"]

model = dict(
    backbone=dict(
        unet=dict(
            _delete_=True,
            preset="diffusers://stable-diffusion-v1-5/stable-diffusion-v1-5",
            condition="null",
        ),
        init_cfg=None,  # its own weights
        blocks=[24, 21, 18, 15],  # the last blocks of strides 8, 16, 32 and 64
    )
)
