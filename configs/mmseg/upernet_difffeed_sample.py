# DifFeed on the sample data: two passes of the small U-Net with learned feedback.
_base_ = "./upernet_gd_sample.py"

model = dict(backbone=dict(feedback="bottleneck"))
