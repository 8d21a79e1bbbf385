"""Imported before all else: says what to activate where Python is not that of the environment.

Nothing here needs more than Python 3.6, so that an older one gets this far.
"""

import os
import platform
import sys
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")


def require(*modules):
    """End with one line, exit status 2, where this Python lacks one of the modules."""
    missing = [name for name in modules if find_spec(name) is None]
    if not missing:
        return
    here = os.path.relpath(VENV) if VENV.startswith(os.getcwd()) else VENV
    activate = os.path.join(here, "bin", "activate")
    if os.path.realpath(sys.prefix) == os.path.realpath(VENV):
        way = f"{here} is not complete; sh inference.sh, in {ROOT}, sets it up"
    elif os.path.exists(activate):
        way = f"activate the environment first: . {activate}"
    else:
        way = f"sh inference.sh, in {ROOT}, makes the environment; then activate it: . {activate}"
    script = os.path.basename(sys.argv[0]) or "python3"
    python = f"{sys.executable} (Python {platform.python_version()})"
    sys.stderr.write(f"{script}: error: {python} lacks {', '.join(missing)}; {way}\n")
    sys.exit(2)


require("oneflow", "numpy", "PIL")
