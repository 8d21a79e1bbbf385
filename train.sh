#!/bin/sh
# Trains ResNet-50 on synthetic data, or on DATA_ROOT/train, validated on DATA_ROOT/validation, or on
# DATA_ROOT itself where that is one folder of images per class and has no validation/: it is split.
#   sh train.sh
#   DATA_ROOT=photos sh train.sh --finetune --model=efficientnet_lite0
#   DATA_ROOT=data/imagenet/ofrecord NUM_EPOCH=90 sh train.sh --batch_size_per_device=128
# Flags are those of of_cnn_train_val.py; yours come last and win.
set -eu
CDPATH='' cd "$(dirname "$0")"
. ./env.sh

if [ -d "${DATA_ROOT:-}" ] && ! [ -e "$DATA_ROOT/validation" ] && ! [ -e "$DATA_ROOT/part-00000" ]; then
    set -- "--train_data_dir=$DATA_ROOT" "$@"
elif [ -n "${DATA_ROOT:-}" ]; then
    set -- "--train_data_dir=$DATA_ROOT/train" "--val_data_dir=$DATA_ROOT/validation" "$@"
fi
exec "$python" of_cnn_train_val.py --save_init --loss_print_every_n_iter=10 \
    ${NUM_NODES:+"--num_nodes=$NUM_NODES"} ${NODE_IPS:+"--node_ips=$NODE_IPS"} \
    ${GPU_NUM_PER_NODE:+"--gpu_num_per_node=$GPU_NUM_PER_NODE"} ${USE_FP16:+"--use_fp16=$USE_FP16"} \
    ${NUM_EPOCH:+"--num_epoch=$NUM_EPOCH"} "$@"
