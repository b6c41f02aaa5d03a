# MAE (ViT-B), 40.8 mIoU in Table 6.
_base_ = ["./_base_/upernet_mae-b.py", "./_base_/ade20k.py", "./_base_/schedule_16k.py"]
