#!/bin/sh
# Runs the tests; any argument goes to pytest:
#   sh test.sh
#   sh test.sh --fast
#   sh test.sh tests/test_env.py -k moved
set -eu
CDPATH='' cd "$(dirname "$0")"
. ./env.sh

exec "$python" -m pytest "$@"
