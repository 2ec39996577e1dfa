#!/usr/bin/env bash
# Finds any Python, which finds the one that the programs run with, or makes .venv for them: see
# benchmarking/environment.py.
#
#   environment::any_python                 prints a Python that is new enough for what needs no packages
#   environment::set_up REQUIREMENTS_FILE   sets PYTHON, or ends the script with one sentence

# Under it the names of the functions here would be none.
set +o posix
unset -v POSIXLY_CORRECT

ENVIRONMENT_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly ENVIRONMENT_ROOT

environment::set_up() {
    local python
    python=$(environment::any_python)
    trap 'exit 130' INT # whatever status pip ends with
    PYTHON=$("$python" -I "$ENVIRONMENT_ROOT/benchmarking/environment.py" set-up "$1")
    trap - INT
}

environment::any_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.{14..10} python \
        "$ENVIRONMENT_ROOT/.venv/bin/python"; do
        command -v "$candidate" >/dev/null || continue
        "$candidate" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        printf '%s' "$candidate"
        return
    done
    printf 'error: %s\n' "no Python >= 3.10 was found; install one (Debian, Ubuntu: apt install python3)" >&2
    exit 1
}
