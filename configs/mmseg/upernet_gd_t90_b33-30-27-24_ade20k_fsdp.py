# Fully sharded: the 553M U-Net fine-tuned on several small cards.
#   torchrun --nproc_per_node=4 tools/mmseg_train.py upernet_gd_t90_b33-30-27-24_ade20k_fsdp.py \
#       --launcher pytorch
_base_ = ["./upernet_gd_t90_b33-30-27-24_ade20k.py", "./_base_/fsdp.py"]
