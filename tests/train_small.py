"""The training script, or after `evaluate` the evaluation script, with the tests' networks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cnns.startup

import cnns.distributed
import model_registry
import of_cnn_evaluate
import of_cnn_train_val
import small
from cnns.errors import run_main
from cnns.launch.worker import leave

model_registry.MODELS.update(small.MODELS)
script = of_cnn_evaluate if sys.argv[1:2] == ["evaluate"] else of_cnn_train_val
if script is of_cnn_evaluate:
    argv = sys.argv[2:]
    # With `evaluate`.
    cnns.distributed.command = lambda script, argv: [sys.executable, *sys.argv]
else:
    argv = None
sys.exit(run_main(lambda: script.main(argv), leave=leave))
