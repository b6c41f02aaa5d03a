"""MMSegmentation adapter: import it by a config's ``custom_imports``.

For instance::

    custom_imports = dict(imports=['diffbackbone.mmseg'], allow_failed_imports=False)
    model = dict(backbone=dict(type='DiffusionBackbone', unet='gd256_uncond', ...))
"""

from diffbackbone.openmmlab.repairs import prepare

prepare("mmseg")

from diffbackbone.openmmlab import (  # noqa: E402, F401  registered
    backbone,
    checks,
    engine,
    fsdp,
    loading,
)
