"""Train with MMSegmentation's own script and options, after checks with clear errors.

For instance::

    python tools/mmseg_train.py upernet_mae-b_ade20k.py
    torchrun --nproc_per_node=8 tools/mmseg_train.py upernet_mae-b_ade20k.py --launcher pytorch
"""

from _mmseg import run

if __name__ == "__main__":
    run("train.py", dataloaders=("train_dataloader", "val_dataloader"))
