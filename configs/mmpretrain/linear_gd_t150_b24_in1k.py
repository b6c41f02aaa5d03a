# Linear probe on the frozen U-Net, t=150, b=24, map pooled to 2x2 (Section 4, Table 1).
_base_ = "attention_gd_t150_b24_in1k.py"

model = dict(
    head=dict(
        _delete_=True,
        type="DiffusionHead",
        head="linear",
        in_channels=1024,
        num_classes=1000,
        pool=2,
        topk=(1, 5),
    )
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))  # not printed
