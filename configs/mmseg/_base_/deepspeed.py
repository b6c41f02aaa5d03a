# Gradients and optimizer state spread over all processes by DeepSpeed 0.14.5 to 0.18 (0.19 lacks a
# module that MMEngine imports). Inherited beside a model's config.
runner_type = "FlexibleRunner"
strategy = dict(
    type="WholeDeepSpeedStrategy",  # MMEngine's DeepSpeedStrategy, which also writes weights.pth
    # Stage 3 would spread the weights, too, but gathers them for each layer's own forward, and the
    # U-Net's attention computes with its layers' weights itself.
    zero_optimization=dict(
        stage=2,
        # keeps the optimizer's state and work in the CPUs' memory:
        # offload_optimizer=dict(device="cpu"),
    ),
    # gradient_clipping=1.0,
    # torch's AdamW in place of DeepSpeed's, which are compiled on first use
    config=dict(zero_allow_untrusted_optimizer=True, zero_force_ds_cpu_optimizer=False),
)
# A config that inherits this also needs optim_wrapper=dict(type="DeepSpeedOptimWrapper").
