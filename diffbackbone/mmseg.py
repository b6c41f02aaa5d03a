"""MMSegmentation adapter: import it by a config's ``custom_imports``.

For instance::

    custom_imports = dict(imports=['diffbackbone.mmseg'], allow_failed_imports=False)
    model = dict(backbone=dict(type='DiffusionBackbone', unet='gd256_uncond', ...))
"""

from diffbackbone.openmmlab.repairs import prepare

prepare("mmseg")

from diffbackbone.openmmlab import engine, fsdp  # noqa: E402, F401  registered
from diffbackbone.openmmlab.backbone import (  # noqa: E402
    DiffusionBackbone,
    DiffusionOptimWrapperConstructor,
)
from diffbackbone.openmmlab.checks import CheckInputsHook  # noqa: E402
from diffbackbone.openmmlab.loading import LoadDeepImage  # noqa: E402

__all__ = [
    "CheckInputsHook",
    "DiffusionBackbone",
    "DiffusionOptimWrapperConstructor",
    "LoadDeepImage",
]
