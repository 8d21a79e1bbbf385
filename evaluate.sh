#!/bin/sh
# Scores the best snapshot of the newest run on its own validation data, or what is named; of a
# DATA_ROOT that is one folder of images per class, what training kept for validation:
#   sh evaluate.sh
#   MODEL_LOAD_DIR=output/snapshots/mine/snapshot_last DATA_ROOT=data/imagenet/ofrecord sh evaluate.sh
# Flags are those of of_cnn_evaluate.py; yours come last and win.
set -eu
CDPATH='' cd "$(dirname "$0")"
. ./env.sh

if [ -n "${DATA_ROOT:-}" ]; then
    data=$DATA_ROOT
    if ! [ -d "$data" ] || [ -e "$data/validation" ] || [ -e "$data/part-00000" ]; then
        data=$data/validation
    fi
    set -- "--val_data_dir=$data" "$@"
fi
exec "$python" of_cnn_evaluate.py \
    ${NUM_NODES:+"--num_nodes=$NUM_NODES"} ${NODE_IPS:+"--node_ips=$NODE_IPS"} \
    ${GPU_NUM_PER_NODE:+"--gpu_num_per_node=$GPU_NUM_PER_NODE"} ${USE_FP16:+"--use_fp16=$USE_FP16"} \
    ${MODEL_LOAD_DIR:+"--model_load_dir=$MODEL_LOAD_DIR"} "$@"
