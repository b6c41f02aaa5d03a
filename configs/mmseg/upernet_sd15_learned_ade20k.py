# Stable Diffusion 1.5 with a learned text embedding (Table 10).
_base_ = "./upernet_sd15_ade20k.py"

model = dict(backbone=dict(unet=dict(condition="learned")))
