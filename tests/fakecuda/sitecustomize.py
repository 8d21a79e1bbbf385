"""Python runs this at its start when the folder is on PYTHONPATH: fakecuda before oneflow.

Workers inherit the environment, so that every process of a run has its devices. Nothing happens
without FAKECUDA_DEVICES.
"""

import os
import sys

if os.environ.get("FAKECUDA_DEVICES"):

    class BeforeOneFlow:
        """Finds no module; the first time that oneflow is asked for, it installs fakecuda."""

        def find_spec(self, name, path=None, target=None):
            if name == "oneflow":
                sys.meta_path.remove(self)
                import fakecuda

                fakecuda.install()
            return None

    sys.meta_path.insert(0, BeforeOneFlow())
