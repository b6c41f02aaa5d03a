# UperNet on a supervised ResNet-50, MMSegmentation's own settings throughout. The paper did not
# train its ResNet-50 rows but took them from DreamTeacher, whose code was not available and whose
# batch size is 16 (section 7.3). For batch 16, start 8 processes: batch_size counts per GPU.
_base_ = "mmseg::_base_/models/upernet_r50.py"

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained="open-mmlab://resnet50_v1c",  # downloaded on first use
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0005),
)
