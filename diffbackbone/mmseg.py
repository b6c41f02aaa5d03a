"""MMSegmentation adapter: import it by a config's ``custom_imports``.

For instance::

    custom_imports = dict(imports=['diffbackbone.mmseg'], allow_failed_imports=False)
    model = dict(backbone=dict(type='DiffusionBackbone', unet='gd256_uncond', ...))
"""

from diffbackbone.openmmlab import repairs

repairs.check_mmseg_stack()

from diffbackbone.openmmlab import (  # noqa: E402
    CheckInputsHook,
    DiffusionBackbone,
    DiffusionOptimWrapperConstructor,
)

__all__ = ["CheckInputsHook", "DiffusionBackbone", "DiffusionOptimWrapperConstructor"]
