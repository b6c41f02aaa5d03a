"""Train with MMSegmentation's own script and options, after checks with clear errors.

For instance ``python tools/mmseg_train.py upernet_mae-b_ade20k.py``.
"""

from diffbackbone.openmmlab.commands import train

if __name__ == "__main__":
    train()
