# Weights, gradients and optimizer state spread over all processes: for cards too small for the
# whole model's. Inherited beside a model's config.
runner_type = "FlexibleRunner"
strategy = dict(
    type="WholeFSDPStrategy",  # MMEngine's FSDPStrategy, whose checkpoints are single files
    model_wrapper=dict(
        type="MMFullyShardedDataParallel",
        # Each card keeps all weights from the forward pass to the backward pass. FULL_SHARD has
        # only one block's there at a time, for one more gathering of all; evaluation in training
        # then needs model.test_cfg.mode=whole.
        sharding_strategy="SHARD_GRAD_OP",
        auto_wrap_policy=dict(type="wrap_blocks"),
        # cpu_offload=True keeps shards and the optimizer's work in the CPUs' memory
    ),
)
# bfloat16 on GPUs, with weights and their sums over processes in float32:
#   --cfg-options optim_wrapper.type=AmpOptimWrapper optim_wrapper.dtype=bfloat16
#       optim_wrapper.loss_scale.enabled=False
