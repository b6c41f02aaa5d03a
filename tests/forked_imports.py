"""What forked.py's server imports: slow packages of others, none of this project's modules.

MMEngine logs the versions of compilers at each start, which takes two seconds: left out here.
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

for _name in ("mmengine.runner.runner", "mmengine._strategy.base"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name).collect_env = dict
