# UperNet on a supervised ResNet-50, MMSegmentation's own settings throughout. The paper did not
# train its ResNet-50 rows but took them from DreamTeacher, whose code was not available and whose
# batch size is 16 (section 7.3). For batch 16, start 8 processes: batch_size counts per GPU.
_base_ = "./upernet.py"

model = dict(
    pretrained="open-mmlab://resnet50_v1c",  # downloaded on first use
    backbone=dict(
        type="ResNetV1c",
        depth=50,
        dilations=(1, 1, 1, 1),
        strides=(1, 2, 2, 2),
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        contract_dilation=True,
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0005),
)
