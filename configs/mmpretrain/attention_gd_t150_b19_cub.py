# Attention head on CUB-200-2011, b=19 (Figure 4: the best block for fine-grained classes).
_base_ = "attention_gd_t150_b24_in1k.py"

model = dict(
    data_preprocessor=dict(num_classes=200),
    backbone=dict(blocks=[19]),
    head=dict(num_classes=200, size=8),  # 256 px at stride 32
)
cub = dict(_delete_=True, type="CUB", data_root="data/CUB_200_2011")
train_dataloader = dict(
    dataset=dict(**cub, split="train", pipeline={{_base_.train_pipeline}}),
)
val_dataloader = dict(dataset=dict(**cub, split="test", pipeline={{_base_.test_pipeline}}))
test_dataloader = val_dataloader
