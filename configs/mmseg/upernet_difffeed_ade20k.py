# DifFeed, 44.0 mIoU in Table 6: the features of {33, 30, 27, 24} in the second of two passes, with
# feedback by the "bottleneck" strategy, which the paper adopts (Table 4).
_base_ = ["./_base_/upernet_gd.py", "./_base_/ade20k.py", "./_base_/schedule_16k.py"]

model = dict(backbone=dict(feedback="bottleneck"))
