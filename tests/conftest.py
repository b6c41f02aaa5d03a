"""The order of the test files, and what they leave behind in their process."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

SLOW = [
    "test_detectron2_training.py",
    "test_faults.py",
    "test_benchmark_steps.py",
    "test_benchmark_timing.py",
    "test_eval_sweep.py",
    "test_openmmlab_mmseg.py",
    "test_paper_frameworks.py",
    "test_other_channels.py",
    "test_openmmlab_engine.py",
    "test_evaluation.py",
    "test_eval_label_efficiency.py",
    "test_eval_classify.py",
    "test_paper_page.py",
    "test_models_diffusers.py",
    "test_eval_onepass.py",
    "test_openmmlab_mmpretrain.py",
    "test_transformers.py",
    "test_eval_families.py",
    "test_hf_segmentation.py",
    "test_export.py",
    "test_openmmlab_fsdp.py",
    "test_openmmlab_commands.py",
    "test_pretrain_training.py",
    "test_benchmark_gpu.py",
    "test_distributed.py",
    "test_hostile_files.py",
    "test_detectron2_visualize.py",
    "test_detectron2_configs.py",
    "test_detectron2_backbone.py",
]


def pytest_configure(config):
    """Let yapf, which mmengine imports, write its cache before several processes would."""
    if not hasattr(config, "workerinput") and importlib.util.find_spec("yapf"):
        importlib.import_module("yapf.yapflib.yapf_api")


def pytest_collection_modifyitems(items):
    """Run slow files first, so that no process waits for one that was begun last."""
    order = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(SLOW)))


@pytest.fixture(scope="module", autouse=True)
def isolated_file():
    """Restore the environment after a file, and forget accelerate's processes.

    MMSegmentation's scripts set LOCAL_RANK, by which accelerate takes a process for one of several.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
