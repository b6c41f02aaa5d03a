# GD (t=90, b=24), 42.3 mIoU in Table 6: one block feeds all four inputs of UperNet.
_base_ = ["./_base_/upernet_gd.py", "./_base_/ade20k.py", "./_base_/schedule_16k.py"]

model = dict(backbone=dict(blocks=[24, 24, 24, 24]))
