#!/bin/sh
# Scores a snapshot on DATA_ROOT/validation, three times over, or on what training kept for validation
# of DATA_ROOT, a folder with one folder of images per class:
#   sh evaluate.sh
#   MODEL_LOAD_DIR=output/snapshots/mine/snapshot_last DATA_ROOT=data/imagenet/ofrecord sh evaluate.sh
# Flags are those of of_cnn_evaluate.py; yours come last and win.
set -eu
cd "$(dirname "$0")"
. ./env.sh

data=${DATA_ROOT:-data/imagenet/ofrecord}
if ! [ -d "$data" ] || [ -e "$data/validation" ] || [ -e "$data/part-00000" ]; then
    data=$data/validation
fi
exec "$python" of_cnn_evaluate.py --num_epochs=3 \
    ${NUM_NODES:+"--num_nodes=$NUM_NODES"} ${NODE_IPS:+"--node_ips=$NODE_IPS"} \
    ${GPU_NUM_PER_NODE:+"--gpu_num_per_node=$GPU_NUM_PER_NODE"} ${USE_FP16:+"--use_fp16=$USE_FP16"} \
    ${MODEL_LOAD_DIR:+"--model_load_dir=$MODEL_LOAD_DIR"} "--val_data_dir=$data" "$@"
