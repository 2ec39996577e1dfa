#!/usr/bin/env bash
# Finds the Python that the programs run with, and installs what is missing on first use.
#
#   environment::any_python                 prints a Python that is new enough for what needs no packages
#   environment::set_up REQUIREMENTS_FILE   sets PYTHON, or ends the script with one sentence
#
# In this order: $PYTHON where the caller sets it; the active python3, PYTHONPATH included, where it
# has everything; .venv beside this file, made from the requirements file on first use. A stamp in
# .venv says for which requirements it is complete, so that an installation that was interrupted is
# finished at the next start.
#
# Run by benchmarking/suite/driver.py as `setup_environment.sh [--dry-run] PROGRAM WORD...` it becomes
# the program in that Python, named by GPU_SHARING_PYTHON; a dry run installs nothing.

# Under it the names of the functions here would be none.
set +o posix
unset -v POSIXLY_CORRECT

ENVIRONMENT_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly ENVIRONMENT_ROOT
readonly VENV_FOLDER=$ENVIRONMENT_ROOT/.venv
readonly VENV_PYTHON=$VENV_FOLDER/bin/python
readonly OLDEST_PYTHON=3.10
readonly PYTHON_NAMES=(python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)

# An entry of PYTHONPATH that is empty or relative means the folder that a script is started in, where
# others may have put a venv.py; for the same reason whatever needs no packages is run with -I.
if [[ -n ${PYTHONPATH:-} ]]; then
    PYTHONPATH=$(tr : '\n' <<<"$PYTHONPATH" | { grep '^/' || true; } | paste -sd :)
    [[ -n $PYTHONPATH ]] || unset PYTHONPATH
fi

environment::set_up() {
    if ! environment::find "$1"; then
        environment::install "$1"
        PYTHON=$VENV_PYTHON
    fi
    # Where the folder may only be read, a stamp that is old or missing costs a look at every start.
    [[ $PYTHON != "$VENV_PYTHON" || ! -w $VENV_FOLDER ]] ||
        environment::fingerprint "$1" >"$(environment::stamp "$1")"
}

# environment::find REQUIREMENTS_FILE: sets PYTHON without installing; false where nothing fits.
environment::find() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        environment::is_new_enough "$PYTHON" ||
            environment::die "PYTHON=$PYTHON is not a Python >= $OLDEST_PYTHON; unset it or name another"
        environment::missing "$PYTHON" "$1" >&2 ||
            environment::die "PYTHON=$PYTHON lacks the packages above; install them or unset PYTHON"
        return
    fi
    for candidate in python3 python; do
        if environment::is_new_enough "$candidate" && environment::missing "$candidate" "$1" >/dev/null; then
            PYTHON=$(command -v "$candidate")
            return
        fi
    done
    environment::venv_is_complete "$1" && PYTHON=$VENV_PYTHON
}

environment::any_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} "${PYTHON_NAMES[@]}" "$VENV_PYTHON"; do
        ! environment::is_new_enough "$candidate" || { printf '%s' "$candidate" && return; }
    done
    environment::die "no Python >= $OLDEST_PYTHON was found; install one (Debian, Ubuntu: apt install python3)"
}

environment::log() { printf '%s\n' "$*" >&2; }

environment::die() {
    environment::log "error: $*"
    exit 1
}

environment::is_new_enough() {
    command -v "$1" >/dev/null &&
        "$1" -I -c "import sys; sys.exit(sys.version_info < (${OLDEST_PYTHON/./, }))" 2>/dev/null
}

# environment::missing PYTHON REQUIREMENTS_FILE [--import]: prints what PYTHON lacks, a line each;
# false if there is anything.
environment::missing() { "$1" "$ENVIRONMENT_ROOT/benchmarking/check_requirements.py" "${@:2}"; }

# A folder that somebody else filled, or whose requirements have moved a little, may be complete
# without its stamp; only a real import tells.
environment::venv_is_complete() {
    environment::is_new_enough "$VENV_PYTHON" || return 1
    [[ $(cat -- "$(environment::stamp "$1")" 2>/dev/null) == "$(environment::fingerprint "$1")" ]] ||
        environment::missing "$VENV_PYTHON" "$1" --import >/dev/null
}

environment::stamp() { printf '%s/complete-%s.sha256' "$VENV_FOLDER" "$(basename -- "$1")"; }

# Of every requirements file, since one names the other.
environment::fingerprint() { cat -- "${1%/*}"/requirements*.txt | sha256sum | cut -d ' ' -f 1; }

environment::install() {
    local missing
    environment::is_new_enough "$VENV_PYTHON" || environment::make_venv
    "$VENV_PYTHON" -I -m pip --version >/dev/null 2>&1 || "$VENV_PYTHON" -I -m ensurepip >&2 ||
        environment::die "no pip in $VENV_FOLDER; delete it"
    missing=$(environment::missing "$VENV_PYTHON" "$1") || true
    environment::log "Installing into $VENV_FOLDER, once (interrupted, it is finished next time):"
    sed -e 's/: .*//' -e 's/^/    /' <<<"$missing" >&2
    [[ $missing != *torch* ]] ||
        environment::log "torch with CUDA is most of it: about 3 GB to download, 6 GB on disk."
    trap 'exit 130' INT # pip ends with a status of its own, which would be taken for a failure
    if ! "$VENV_PYTHON" -I -m pip install --disable-pip-version-check -r "$1" >&2; then
        environment::log "Still missing in $VENV_FOLDER:"
        environment::missing "$VENV_PYTHON" "$1" >&2 || true
        environment::die "pip could not install the packages above; start again with a network," \
            "or from a Python that has them"
    fi
    trap - INT
    environment::missing "$VENV_PYTHON" "$1" --import >&2 || environment::die "what pip installed" \
        "does not work (see above); delete $VENV_FOLDER and start again"
}

# What is there instead is an interrupted attempt, or belongs to a Python that is gone or too old.
environment::make_venv() {
    local candidate
    for candidate in "${PYTHON_NAMES[@]}"; do
        environment::is_new_enough "$candidate" || continue
        "$candidate" -I -c 'import venv, ensurepip' 2>/dev/null || continue
        environment::log "Making $VENV_FOLDER with $(command -v "$candidate")."
        "$candidate" -I -m venv --clear "$VENV_FOLDER" ||
            environment::die "$candidate could not make $VENV_FOLDER (see above)"
        return
    done
    environment::die "no Python >= $OLDEST_PYTHON with its venv module was found; install one" \
        "(Debian, Ubuntu: apt install python3-venv)"
}

# environment::become [--dry-run] PROGRAM WORD...
environment::become() {
    local -r requirements=$ENVIRONMENT_ROOT/requirements.txt
    local runner=""
    if [[ $1 != --dry-run ]]; then
        environment::set_up "$requirements"
    elif shift && ! environment::find "$requirements"; then
        printf 'would install: requirements.txt into %s\n' "$VENV_FOLDER"
        runner=$(environment::any_python)
        PYTHON=$VENV_PYTHON
    fi
    GPU_SHARING_PYTHON=$PYTHON exec "${runner:-$PYTHON}" "$@"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -Eeuo pipefail
    environment::become "$@"
fi
