import signal
import sys
from pathlib import Path

# The scripts and modules lie flat in the directory above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cnns.startup  # noqa: F401  (before any test imports oneflow)

# A shell starts what is behind `&` with SIGINT ignored; what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
