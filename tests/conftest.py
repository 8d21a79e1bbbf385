import cnns.startup  # noqa: F401  (before any test imports oneflow)

import signal

# A shell starts what is behind `&` with SIGINT ignored; what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
