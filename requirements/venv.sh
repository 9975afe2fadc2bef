#!/bin/sh
# venv.sh PYTHON FOLDER: makes a virtual environment with pip, or keeps the one
# there is. Says what to do where this machine's Python will not do.
set -eu
python=$1
folder=$2

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

if "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "    keeping the one there is"
    exit
fi

command -v "$python" >/dev/null 2>&1 ||
    fail "no command '$python': expected Python 3.11 or newer." \
        "To fix it: install one, or name it: make PYTHON=/path/to/python3.12"

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' ||
    fail "'$python' is $("$python" --version 2>&1): expected 3.11 to 3.14." \
        "To fix it: name another one: make PYTHON=/path/to/python3.12"

if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv --clear "$folder"
else
    # Some systems ship Python without ensurepip; a pip outside can stand in.
    "$python" -m venv --clear --without-pip "$folder" &&
        "$python" -m pip --python "$folder/bin/python" install --quiet pip ||
        fail "'$python' cannot make virtual environments: expected the module ensurepip." \
            "To fix it: install it (Debian and Ubuntu: apt install python3-venv)," \
            "or name another Python: make PYTHON=/path/to/python3.12"
fi
