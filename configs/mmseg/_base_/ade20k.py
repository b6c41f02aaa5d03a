# ADE20K with MMSegmentation's settings: crops of 512, short side 512 in evaluation, 150 classes.
# Batch 2 as the paper trains everything (sections 4.4 and 7.3).
_base_ = "./runtime.py"

data = dict(type="ADE20KDataset", data_root="data/ade/ADEChallengeData2016")
load_images = dict(type="LoadImageFromFile")
load_labels = dict(type="LoadAnnotations", reduce_zero_label=True)
pack = dict(type="PackSegInputs")
resize = dict(scale=(2048, 512), keep_ratio=True)
train_pipeline = [
    load_images,
    load_labels,
    dict(type="RandomResize", ratio_range=(0.5, 2.0), **resize),
    dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    pack,
]
test_pipeline = [load_images, dict(type="Resize", **resize), load_labels, pack]
tta_pipeline = [  # tools/mmseg_test.py --tta
    load_images,
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale_factor=ratio, keep_ratio=True)
                for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
            [dict(type="LoadAnnotations")],
            [pack],
        ],
    ),
]
loader = dict(num_workers=4, persistent_workers=True)
train_dataloader = dict(
    batch_size=2,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
        **data,
    ),
    **loader,
)
val_dataloader = dict(
    batch_size=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
        **data,
    ),
    **loader,
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
