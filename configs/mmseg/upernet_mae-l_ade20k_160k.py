_base_ = ["./_base_/upernet_mae-l.py", "./_base_/ade20k.py", "./_base_/schedule_160k.py"]
