# DifFeed, bottleneck, with the attention head; the U-Net is frozen (Section 3.3, Tables 1 and 4).
_base_ = "attention_gd_t150_b24_in1k.py"

model = dict(backbone=dict(feedback="bottleneck"))
train_dataloader = dict(batch_size=4)  # on 4 GPUs, the published script's 16
val_dataloader = dict(batch_size=4)
test_dataloader = val_dataloader
