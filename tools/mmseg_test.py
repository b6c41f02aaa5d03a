"""Evaluate with MMSegmentation's own script and options, after checks with clear errors.

For instance::

    python tools/mmseg_test.py upernet_mae-b_ade20k.py work_dirs/.../iter_16000.pth
"""

from diffbackbone.openmmlab.commands import test

if __name__ == "__main__":
    test()
