# Supervised ResNet-50, 40.9 mIoU in Table 6 (a number the paper takes from DreamTeacher).
_base_ = ["./_base_/upernet_r50.py", "./_base_/ade20k.py", "./_base_/schedule_16k.py"]

# MMSegmentation's learning-rate policy for SGD, in place of warm-up and linear decay
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=16000)]
