_base_ = ["./_base_/upernet_gd.py", "./_base_/ade20k.py", "./_base_/schedule_160k.py"]

model = dict(backbone=dict(feedback="bottleneck"))
