# ADE20K as MMSegmentation ships it: crops of 512, short side 512 in evaluation, 150 classes.
# Batch 2 as the paper trains everything (sections 4.4 and 7.3).
_base_ = ["mmseg::_base_/datasets/ade20k.py", "mmseg::_base_/default_runtime.py"]

custom_imports = dict(imports=["diffbackbone.mmseg"], allow_failed_imports=False)

train_dataloader = dict(batch_size=2)
