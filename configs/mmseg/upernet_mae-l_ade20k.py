# MAE (ViT-L), 45.8 mIoU in Table 6.
_base_ = ["./_base_/upernet_mae-l.py", "./_base_/ade20k.py", "./_base_/schedule_16k.py"]
