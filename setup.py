"""Packaging of diffbackbone; the tested versions are listed in README.md."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

MMSEG = [
    "torch>=2.6",  # older ones can't read MMEngine's checkpoints as weights only
    "mmengine>=0.10.7,<0.11",
    "mmcv-lite>=2.1.0,<2.2",  # a compiled mmcv 2.1 serves as well, and wins where it is installed
    "mmsegmentation>=1.2.2,<1.3",
    "ftfy",  # mmsegmentation imports ftfy and regex without declaring them
    "regex",
    "setuptools<82",  # mmengine and mmcv import pkg_resources
    "torchvision",
]
MMPRETRAIN = [
    "torch>=2.6",
    "mmengine>=0.10.7,<0.11",
    "mmcv-lite>=2.1.0,<2.2",
    "mmpretrain>=1.2.0,<1.3",
    "setuptools<82",
    "torchvision",
]
DETECTRON2 = [  # Detectron2 itself is not on PyPI: see its install guide
    "torch>=2.6",  # shown with 2.11, which the wheel at hand was compiled for
    "fvcore>=0.1.5",
    "pycocotools",
    "shapely",  # Detectron2 crops polygons by it, but doesn't declare it
    "timm",  # Detectron2's ViT, for the comparison with MAE
    "setuptools<82",  # detectron2.model_zoo imports pkg_resources
    "torchvision",
]
SAMPLE = ["scikit-learn", "pillow", "opencv-python", "tqdm"]
TOOLS = [  # command lines, pictures, classification, pretraining, benchmarks
    *SAMPLE,
    "tyro>=0.9",
    "matplotlib>=3.7",
    "torchvision",
    "torchmetrics>=1.4",
    "accelerate>=1.0",
]
DEEPSPEED = [*MMSEG, "deepspeed>=0.14.5,<0.19"]  # 0.19 lacks a module that MMEngine imports
EXPORT = ["onnx", "onnxscript", "onnxruntime"]  # tools/export.py --format onnx

setup(
    name="diffbackbone",
    version="0.1.0",
    description="Text-free diffusion U-Nets as backbones for Detectron2 and MMSegmentation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.9,<3.14",
    packages=find_packages(include=["diffbackbone", "diffbackbone.*"]),
    package_data={"diffbackbone": ["py.typed", "weights/*"]},
    install_requires=[
        'torch>=2.1; python_version < "3.13"',
        'torch>=2.6; python_version >= "3.13"',  # 2.5 can't save there: its pickler is read-only
        "numpy>=1.24",
        "safetensors>=0.4",
        "filelock",
    ],
    extras_require={
        "mmseg": MMSEG,
        "mmpretrain": MMPRETRAIN,
        "deepspeed": DEEPSPEED,
        "detectron2": DETECTRON2,
        "sample": SAMPLE,
        "tools": TOOLS,
        "export": EXPORT,
        "dev": [*TOOLS, *EXPORT, "pytest", "pytest-xdist", "ruff==0.17.5"],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(9, 14)),
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
