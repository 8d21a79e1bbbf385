"""of_cnn_train_val.py with the networks of the tests, for tests that need a process of it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import oneflow_setup  # noqa: F401  (first, see there)

import config
import model_util
import of_cnn_train_val
import small

model_util.MODELS.update(tiny=small.TINY, toy=small.TOY)
sys.exit(config.run_main(of_cnn_train_val.main))
