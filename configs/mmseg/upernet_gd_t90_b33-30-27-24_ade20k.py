# GD (t=90, B={33, 30, 27, 24}), 44.3 mIoU in Table 6.
_base_ = ["./_base_/upernet_gd.py", "./_base_/ade20k.py", "./_base_/schedule_16k.py"]
