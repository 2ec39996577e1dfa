#!/usr/bin/env bash
# Finds any Python, which finds the one that the programs run with, or makes .venv for them: see
# benchmarking/environment.py.
#
#   environment::any_python                 prints a Python that is new enough for what needs no packages
#   environment::set_up REQUIREMENTS_FILE   sets PYTHON, or ends the script with one sentence
#
# Run by benchmarking/drivers/driver.py as `setup_environment.sh [--dry-run] PROGRAM WORD...` it becomes
# the program in that Python, named by GPU_SHARING_PYTHON; a dry run installs nothing.

# Under it the names of the functions here would be none.
set +o posix
unset -v POSIXLY_CORRECT

ENVIRONMENT_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly ENVIRONMENT_ROOT

# An entry of PYTHONPATH that is empty or relative means the folder that a script is started in, where
# others may have put a venv.py; for the same reason whatever needs no packages is run with -I.
if [[ -n ${PYTHONPATH:-} ]]; then
    PYTHONPATH=$(tr : '\n' <<<"$PYTHONPATH" | { grep '^/' || true; } | paste -sd :)
    [[ -n $PYTHONPATH ]] || unset PYTHONPATH
fi

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

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -Eeuo pipefail
    python=$(environment::any_python)
    exec "$python" -I "$ENVIRONMENT_ROOT/benchmarking/environment.py" run "$@"
fi
