# What the features of a frozen U-Net are worth: a slim UperNet on the sample data, two to three
# minutes on a CPU core. For tools/label_efficiency.py, which sets weights, labels and seed.
_base_ = "./upernet_gd_sample.py"

head = dict(dropout_ratio=0.0, channels=32)
model = dict(
    backbone=dict(freeze=True, out_channels=32),
    decode_head=dict(in_channels=[32, 32, 32, 32], **head),
    auxiliary_head=dict(in_channels=32, **head),
)

max_iters = 400
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=20, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=-1, save_last=False))
