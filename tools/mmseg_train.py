"""Train with MMSegmentation's own script and options, after checks with clear errors.

For instance::

    python tools/mmseg_train.py upernet_mae-b_ade20k.py
    torchrun --nproc_per_node=8 tools/mmseg_train.py upernet_mae-b_ade20k.py --launcher pytorch
"""

from diffbackbone.openmmlab.commands import train

if __name__ == "__main__":
    train()
