"""Draw the curves of one or several runs, also while they go on.

python3 tools/report.py output/snapshots/model_save-20261125011532
python3 tools/report.py output/snapshots/run1 output/snapshots/run2 --output=comparison

Writes report.html, one file that needs no other, and its pictures as PNG: loss, accuracy, learning
rate and throughput over the epochs, the flags in which the runs differ, and a table of the epochs.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.environment  # noqa: F401  (first, see there)

from cnns.errors import UsageError, run_main, say
from cnns.flags.parser import Parser
from cnns.record import read_run
from cnns.report.curves import write_curves

MAX_RUNS = 20
COMPARISON = "comparison"


def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    runs = [read_run(path) for path in args.runs]
    for run in runs:
        if not run.metrics:
            raise UsageError(
                f"{run.directory} has no figures yet: a run prints its first line soon"
            )
    own = os.path.join(args.runs[0], "report") if len(runs) == 1 else COMPARISON
    say(write_curves(runs, args.output or own), sys.stdout)
    return None


def parse_args(argv: list[str] | None) -> Namespace:
    parser = Parser("Draw the curves of one or several runs, also while they go on.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help=f"where to write; unless given, report/ in the run, and {COMPARISON}/ of several",
    )
    args = parser.parse_args(argv)
    if len(args.runs) > MAX_RUNS:
        raise UsageError(f"{len(args.runs)} runs are too many for one picture; at most {MAX_RUNS}")
    return args


if __name__ == "__main__":
    sys.exit(run_main(main))
