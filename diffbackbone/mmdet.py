"""MMDetection adapter: import it by a config's ``custom_imports``.

For instance::

    custom_imports = dict(imports=['diffbackbone.mmdet'], allow_failed_imports=False)
    model = dict(backbone=dict(type='DiffusionBackbone', unet='gd256_uncond', ...))
"""

from diffbackbone.openmmlab.repairs import prepare

prepare("mmdet")

from diffbackbone.openmmlab import backbone, checks, engine, fsdp  # noqa: E402, F401  registered
