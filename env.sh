# Sourced by every wrapper, in the directory of this file: sets $python to the Python of .venv. It makes
# .venv from requirements.txt the first time, and again, always from nothing, when that file changes,
# when the directory was moved (the scripts in .venv/bin hold its path), when $PYTHON names another
# Python 3.10, when $ONEFLOW_WHEEL names another OneFlow, and when a set-up was cut short (pip takes
# half a package for a whole one).

python=$(pwd -P)/.venv/bin/python3
# Modules of the caller's would shadow those of .venv.
unset PYTHONPATH PYTHONHOME

# fail STATUS MESSAGE
fail() {
    printf 'env.sh: %s\n' "$2" >&2
    exit "$1"
}

# Prints the path of the CPython 3.10 that command $1 starts, seen through shims and virtual
# environments. Status 3: it is one, but cannot make a virtual environment.
real_python() {
    "$1" -I -c '
import importlib.util, os, sys
if sys.implementation.name != "cpython" or sys.version_info[:2] != (3, 10):
    sys.exit(1)
if not (importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv")):
    sys.exit(3)
path = sys.executable if sys.prefix == sys.base_prefix else sys.base_prefix + "/bin/python3.10"
print(os.path.realpath(path))' 2>/dev/null
}

find_python() {
    without_venv=
    if [ -n "${PYTHON:-}" ]; then
        real_python "$PYTHON" && return
        [ $? -ne 3 ] || without_venv=$PYTHON
    else
        for candidate in python3.10 "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.10*/bin/python3.10; do
            real_python "$candidate" && return
            [ $? -ne 3 ] || without_venv=$candidate
        done
        if command -v uv >/dev/null; then
            real_python "$(uv python find 3.10 2>/dev/null)" && return
            echo 'Getting Python 3.10 with uv ...' >&2
            uv python install 3.10 >&2 && real_python "$(uv python find 3.10 2>/dev/null)" && return
        fi
    fi
    if [ -n "$without_venv" ]; then
        fail 2 "$without_venv lacks the module ensurepip: install it (Debian and Ubuntu: apt-get install python3.10-venv)"
    elif [ -n "${PYTHON:-}" ]; then
        found=$("$PYTHON" -c 'import platform as p
print(p.python_implementation() + " " + p.python_version())' 2>/dev/null) || found='no Python that runs'
        fail 2 "PYTHON=$PYTHON is $found, CPython 3.10 is needed: correct PYTHON, or unset it to have one looked for"
    fi
    fail 2 'no CPython 3.10 found, and OneFlow 0.9.0 needs it: get it by "apt-get install python3.10-venv", "pyenv install 3.10" or "uv python install 3.10", or set PYTHON to its path'
}

# The path of $ONEFLOW_WHEEL, a OneFlow to take in place of the pinned one, at the caller's own risk.
find_wheel() {
    case ${ONEFLOW_WHEEL##*/} in
    *%2B*) fail 2 "ONEFLOW_WHEEL=$ONEFLOW_WHEEL: pip does not take %2B in a name, rename the file with + in its place" ;;
    oneflow-*-cp310-cp310-*x86_64.whl) ;;
    oneflow-*.whl)
        fail 2 "ONEFLOW_WHEEL=$ONEFLOW_WHEEL is for another Python or machine: CPython 3.10 on Linux x86-64 needs one whose name ends with -cp310-cp310-...x86_64.whl" ;;
    *) fail 2 "ONEFLOW_WHEEL=$ONEFLOW_WHEEL is not the path of a OneFlow wheel, oneflow-...-cp310-cp310-...x86_64.whl" ;;
    esac
    [ -f "$ONEFLOW_WHEEL" ] ||
        fail 2 "ONEFLOW_WHEEL=$ONEFLOW_WHEEL: there is no such file (a relative path starts at $PWD)"
    printf '%s/%s\n' "$(CDPATH='' cd "$(dirname "$ONEFLOW_WHEEL")" && pwd -P)" "${ONEFLOW_WHEEL##*/}"
}

# stamp PYTHON WHEEL
stamp() {
    cksum <requirements.txt
    pwd -P
    printf '%s\n' "$1" ${2:+"$2"}
}

# The path of the wheel that OneFlow was installed from; nothing where it is the pinned one.
stamped_wheel() {
    [ ! -f .venv/stamp ] || sed -n 4p .venv/stamp
}

# Whether .venv is whole and up to date. $base is the Python it must stand on, empty: any 3.10; $wheel
# what OneFlow must be installed from, empty: anything.
is_ready() {
    [ -f .venv/stamp ] && "$python" -I -c '' 2>/dev/null &&
        [ "$(cat .venv/stamp)" = "$(stamp "${base:-$(sed -n 3p .venv/stamp)}" "${wheel:-$(stamped_wheel)}")" ]
}

# The lock belongs to file descriptor 9, so it ends with the last process of the set-up, however that
# ends. File systems without locks have to do without.
take_lock() {
    "$base" -I -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("Waiting for another process that sets up .venv ...", file=sys.stderr, flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    pass'
}

# explain TEXT: ends with the cause that TEXT, what venv or pip said, shows.
explain() {
    printf '%s\n' "$1" | tail -n 5 >&2
    case $1 in
    *'No space left'* | *'Disk quota'*)
        fail 1 'the disk is full: setting up .venv takes 7 GB for a while, 4 GB after that' ;;
    *'Failed to establish'* | *'Connection'* | *'Read timed out'* | *'SSLError'* | *'ProxyError'*)
        fail 1 'pip cannot reach the package index: see to the network, or to PIP_INDEX_URL, PIP_PROXY and PIP_CERT' ;;
    *'DO NOT MATCH THE HASHES'*)
        fail 1 'a package differs from the one that requirements.txt was tested with (its hash, in the lines above): see which index it came from' ;;
    *'ResolutionImpossible'*)
        fail 1 'the OneFlow of ONEFLOW_WHEEL needs other versions than requirements.txt pins: change them there' ;;
    *'No matching distribution'*)
        fail 1 'the package index lacks a package for this machine (OneFlow 0.9.0 is for Linux on x86-64): see .venv/setup.log' ;;
    esac
    fail 1 'setting up .venv failed, as the lines above say'
}

install() {
    TMPDIR=$PWD/.venv/tmp PIP_USER=0 "$python" -I -m pip install --only-binary=:all: --no-input \
        --progress-bar=off --disable-pip-version-check "$@" </dev/null
}

install_pinned() {
    install --no-deps --require-hashes -r requirements.txt && "$python" -I -m pip check
}

# The wheel brings dependencies of its own; what is pinned stays as it is. The libraries of CUDA 12 go
# into the same directories as those of CUDA 11. A constraint cannot have a hash: neither has the wheel.
install_wheel() {
    drop='/^oneflow==/d'
    case ${wheel##*/} in
    *cu12*) drop="$drop; /^nvidia-.*-cu11==/d" ;;
    esac
    sed "$drop" requirements.txt >.venv/tmp/others.txt &&
        install --no-deps --require-hashes -r .venv/tmp/others.txt &&
        sed 's/ .*//' .venv/tmp/others.txt >.venv/tmp/constraints.txt &&
        install --constraint=.venv/tmp/constraints.txt "$wheel"
}

set_up() {
    # bash forgets a Ctrl-C that falls into a command which then ends well.
    trap 'fail 130 "interrupted; the next run sets .venv up from the start"' INT
    take_lock || exit
    # Another process may have finished it meanwhile.
    is_ready && return
    if [ -n "$wheel" ]; then
        # Before anything is deleted. The directory of a zip file is at its end, so this finds a cut one.
        "$base" -I -m zipfile -l "$wheel" >/dev/null 2>&1 ||
            fail 2 "$wheel (ONEFLOW_WHEEL) is not a whole wheel: download it again"
    elif [ -n "$(stamped_wheel)" ]; then
        echo "OneFlow will be the one of requirements.txt again, not $(stamped_wheel): ONEFLOW_WHEEL is not set." >&2
    fi
    rm -f .venv/stamp
    # Taken now: requirements.txt may change while pip works.
    new_stamp=$(stamp "$base" "$wheel")
    echo "Setting up .venv with $("$base" -V) from requirements.txt${wheel:+ and $wheel} (once, a few minutes, 2 GB to load, 4 GB on disk; log: .venv/setup.log) ..." >&2
    said=$("$base" -I -m venv --clear .venv 2>&1) || explain "$said"

    # The caller's settings say where packages come from, never where they go or which they are.
    unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_DRY_RUN PIP_REQUIRE_VIRTUALENV PIP_IGNORE_INSTALLED
    unset PIP_REQUIREMENT PIP_CONSTRAINT PIP_EDITABLE PIP_NO_BINARY PIP_ONLY_BINARY PIP_REQUIRE_HASHES
    # Within .venv, what an interrupted pip leaves of its 2 GB goes at the next set-up.
    mkdir .venv/tmp
    if [ -z "$wheel" ]; then
        install_pinned >.venv/setup.log 2>&1 || explain "$(cat .venv/setup.log)"
    else
        install_wheel >.venv/setup.log 2>&1 || explain "$(cat .venv/setup.log)"
        said=$("$python" -I -m pip check 2>&1) || printf 'pip check says of this OneFlow: %s\n' "$said" >&2
    fi
    rm -rf .venv/tmp
    printf '%s\n' "$new_stamp" >.venv/stamp
}

base=
wheel=
if [ -n "${PYTHON:-}" ]; then
    base=$(find_python) || exit
fi
if [ -n "${ONEFLOW_WHEEL:-}" ]; then
    wheel=$(find_wheel) || exit
fi
if ! is_ready; then
    base=${base:-$(find_python)} || exit
    (set_up) 9>>.venv.lock || exit
fi
wheel=$(stamped_wheel)
[ -z "$wheel" ] || echo "OneFlow is the one of $wheel, with which this toolkit was not tested." >&2
