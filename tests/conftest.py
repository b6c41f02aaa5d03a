"""The order of the test files."""

from __future__ import annotations

SLOW = [
    "test_tools_detectron2.py",
    "test_faults.py",
    "test_benchmark_steps.py",
    "test_benchmark_timing.py",
    "test_benchmark_gpu.py",
    "test_evaluation.py",
    "test_mmseg.py",
    "test_tools_sweep.py",
    "test_tools_label_efficiency.py",
    "test_export.py",
    "test_sharded.py",
    "test_tools_classification.py",
    "test_tools_mmseg.py",
    "test_pretrain_training.py",
    "test_distributed.py",
    "test_hostile_files.py",
    "test_mmpretrain.py",
    "test_tools_visualize.py",
    "test_detectron2.py",
]


def pytest_collection_modifyitems(items):
    """Files that take long come first: begun last, one leaves the other process with nothing."""
    order = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(SLOW)))
