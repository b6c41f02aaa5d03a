_base_ = ["./_base_/upernet_r50.py", "./_base_/ade20k.py", "./_base_/schedule_160k.py"]

# MMSegmentation's learning-rate policy for SGD, in place of warm-up and linear decay
param_scheduler = [
    dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=160000)
]
