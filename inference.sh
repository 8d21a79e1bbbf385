#!/bin/sh
# Classifies images, data/cat.jpg unless others are given:
#   sh inference.sh
#   sh inference.sh photos --output=csv
#   IMAGE_PATH=photos/fish.jpg MODEL_LOAD_DIR=output/snapshots/mine/snapshot_last sh inference.sh
# Flags are those of of_cnn_inference.py; yours come last and win.
set -eu
CDPATH='' cd "$(dirname "$0")"
. ./env.sh

exec "$python" of_cnn_inference.py ${MODEL_LOAD_DIR:+"--model_load_dir=$MODEL_LOAD_DIR"} \
    ${IMAGE_PATH:+"--image_path=$IMAGE_PATH"} "$@"
