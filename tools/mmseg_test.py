"""Evaluate with MMSegmentation's own script and options, after checks with clear errors.

For instance ``python tools/mmseg_test.py upernet_mae-b_ade20k.py iter_16000.pth``.
"""

from diffbackbone.openmmlab.commands import evaluate

if __name__ == "__main__":
    evaluate()
