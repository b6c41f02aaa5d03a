"""Packaging of diffbackbone; docs/install.md lists the tested versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# pictures and links to files work in the repository only: keep the links' text
README = re.sub(r"!\[[^]]*\]\((?!https:)[^)]*\)\n*|\[([^]]*)\]\((?!https:)[^)]*\)", r"\1", README)

OPENMMLAB = [
    "mmengine>=0.10.7,<0.11",
    "mmcv-lite>=2.1.0,<2.2",  # replaceable by mmcv 2.1 with compiled operators
    "setuptools<82",  # mmengine and mmcv import pkg_resources
    "torchvision",
]
MMSEG = [
    *OPENMMLAB,
    "mmsegmentation>=1.2.2,<1.3",
    "ftfy",  # mmsegmentation imports ftfy and regex without declaring them
    "regex",
]
MMPRETRAIN = [*OPENMMLAB, "mmpretrain>=1.2.0,<1.3"]
DETECTRON2 = [  # Detectron2 itself is not on PyPI: see its install guide
    "fvcore>=0.1.5",
    "pycocotools",
    "shapely",  # Detectron2 crops polygons with it, but doesn't declare it
    "timm",  # Detectron2's ViT, for the comparison with MAE
    "setuptools<82",  # detectron2.model_zoo imports pkg_resources
    "torchvision",
]
TOOLS = [  # sample data, evaluation, pretraining, benchmarks, plots
    "accelerate>=1.0",
    "matplotlib>=3.7",
    "opencv-python",
    "pillow",
    "scikit-learn",
    "scipy",
    "torchmetrics>=1.4",
    "torchvision",
    "tqdm",
    "tyro>=0.9",
]
HF = ["transformers>=5.6", "accelerate>=1.1", "pillow", "torchvision"]  # diffbackbone.transformers
TIMM = ["timm>=1.0.9"]  # diffbackbone.timm, and networks to compare with
DIFFUSERS = [  # unet="diffusers://..."
    "diffusers>=0.30",
    "transformers>=4.40",  # text encoders, for the empty prompt's embedding
    "accelerate>=1.0",  # lets diffusers read weights without a copy
]
EXPORT = ["onnx", "onnxscript", "onnxruntime"]  # tools/export.py --format onnx
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]

setup(
    name="diffbackbone",
    version="0.1.0",
    description="Pretrained diffusion models as backbones for detection and segmentation",
    long_description=README,
    long_description_content_type="text/markdown",
    license="MIT",
    author="The diffbackbone developers",
    keywords="diffusion segmentation detection backbone features",
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["diffbackbone", "diffbackbone.*"]), "diffbackbone.configs"],
    package_dir={"diffbackbone.configs": "configs"},
    package_data={
        "diffbackbone": ["py.typed", "weights/*"],
        "diffbackbone.configs": ["**/*.py", "**/*.yaml"],
    },
    entry_points={"console_scripts": ["diffbackbone = diffbackbone.__main__:main"]},
    install_requires=["torch>=2.6", "numpy>=1.24", "safetensors>=0.4", "filelock"],
    extras_require={
        "mmseg": MMSEG,
        "mmpretrain": MMPRETRAIN,
        "detectron2": DETECTRON2,
        "tools": TOOLS,
        "hf": HF,
        "timm": TIMM,
        "diffusers": DIFFUSERS,
        "export": EXPORT,
        "docs": DOCS,
        "dev": [
            *TOOLS,
            *HF,
            *TIMM,
            *DIFFUSERS,
            *EXPORT,
            *DOCS,
            "import-linter>=2.1",
            "nox",
            "pytest",
            "pytest-xdist",
            "ruff==0.17.5",
            "segmentation_models_pytorch",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
