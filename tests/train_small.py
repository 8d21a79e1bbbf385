"""The training script, or after `evaluate` the evaluation script, with the tests' networks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import oneflow_setup  # noqa: F401  (first, see there)

import config
import launch_util
import model_util
import of_cnn_evaluate
import of_cnn_train_val
import small

model_util.MODELS.update(small.MODELS)
script = of_cnn_evaluate if sys.argv[1:2] == ["evaluate"] else of_cnn_train_val
if script is of_cnn_evaluate:
    argv = sys.argv[2:]
    launch_util.command = lambda script, argv: [sys.executable, *sys.argv]  # with `evaluate`
else:
    argv = None
sys.exit(config.run_main(lambda: script.main(argv), leave=launch_util.leave))
