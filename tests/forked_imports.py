"""What forked.py's server imports: slow packages of others, none of this project's modules.

MMEngine logs the versions of compilers at each start, which takes two seconds, and lays the config
out nicely for each checkpoint, which takes one: not here.
"""

from __future__ import annotations

import contextlib
import importlib

for _name in (
    "torch.distributed.optim",
    "torch.nn.parallel",
    "torchvision",
    "PIL.Image",
    "cv2",
    "matplotlib.pyplot",
    "scipy.interpolate",
    "scipy.ndimage",
    "scipy.optimize",
    "timm",
    "yapf",
    "mmcv.transforms",
    "mmengine.runner",
    "mmengine.visualization",
    "mmseg.registry",
    "mmseg.structures",
    "detectron2.checkpoint",
    "detectron2.data",
    "detectron2.engine",
    "detectron2.evaluation",
    "detectron2.modeling",
):
    with contextlib.suppress(Exception):  # not installed, or too old or new for another
        importlib.import_module(_name)

with contextlib.suppress(ImportError):
    for _name in ("mmengine.runner.runner", "mmengine._strategy.base"):
        importlib.import_module(_name).collect_env = dict
    importlib.import_module("mmengine.config.config").FormatCode = lambda text, **_: (text, True)
