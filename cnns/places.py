"""Where files are searched for and written unless a flag says otherwise."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
# Runs make their directories here.
SNAPSHOT_ROOT = os.path.join("output", "snapshots")
# The original page's pretrained model; taken where it lies in the working directory.
PUBLISHED_FOLDER = "resnet_v15_of_best_model_val_top1_77318"
# Validation data, where a snapshot does not name them.
VAL_DATA_DIR = os.path.join("data", "imagenet", "ofrecord", "validation")
# What folders of pictures are converted into.
CACHE_ROOT = os.path.join("output", "cache")
# Exported files.
ONNX_ROOT = os.path.join("onnx", "model")
