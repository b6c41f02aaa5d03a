# The sample data of tools/make_sample_data.py: digits on photographs, scenes of 64 to 96 px.
_base_ = "./runtime.py"

metainfo = dict(
    classes=(
        *("background", "zero", "one", "two", "three", "four"),
        *("five", "six", "seven", "eight", "nine"),
    ),
    palette=[
        *([38, 44, 56], [230, 57, 70], [244, 140, 54], [255, 214, 64]),
        *([146, 200, 62], [34, 160, 107], [64, 196, 220], [58, 110, 230]),
        *([142, 84, 233], [232, 94, 190], [160, 108, 74]),
    ],
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomCrop", crop_size=(64, 64)),  # digits are not flipped
    dict(type="PackSegInputs"),
]
test_pipeline = [t for t in train_pipeline if t["type"] != "RandomCrop"]
dataset = dict(
    type="BaseSegDataset",
    data_root="data/sample/ADEChallengeData2016",
    metainfo=metainfo,
    reduce_zero_label=True,
)
loader = dict(num_workers=1, persistent_workers=True)
train_dataloader = dict(
    batch_size=8,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
    **loader,
)
val_dataloader = dict(
    batch_size=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
    **loader,
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
