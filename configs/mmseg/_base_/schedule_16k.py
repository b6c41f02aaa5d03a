# 16k iterations, the number printed in the paper (Table 6). Everything but the optimizer.
# Warm-up and linear decay are those of github.com/implus/mae_segmentation, which the paper
# takes its MAE settings from; the paper prints no schedule for the other backbones.
train_cfg = dict(type="ResumableIterBasedTrainLoop", max_iters=16000, val_interval=8000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=16000),
]

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="WholeCheckpointHook",
        by_epoch=False,
        interval=4000,
        max_keep_ckpts=2,
        save_best="mIoU",
    ),
    check_loss=dict(type="CheckLossHook"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
