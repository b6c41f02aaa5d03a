"""Evaluate with MMSegmentation's own script and options, after checks with clear errors.

For instance::

    python tools/mmseg_test.py upernet_mae-b_ade20k.py work_dirs/.../iter_16000.pth
"""

from _mmseg import run

if __name__ == "__main__":
    run("test.py", dataloaders=("test_dataloader",))
