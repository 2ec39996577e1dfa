#!/usr/bin/env bash
# Finds the Python that the other scripts run with, and installs what is missing on first use.
# Sourced by run_experiments.sh, stress_test.sh and run_tests.sh:
#
#   setup_environment REQUIREMENTS_FILE     sets PYTHON, or ends the script with one sentence
#
# In this order: $PYTHON where the caller sets it; the active python3, PYTHONPATH included, where it
# has everything; .venv beside this file, made from the requirements file on first use. A stamp in
# .venv says for which requirements it is complete, so that an installation that was interrupted is
# finished at the next start.

ENVIRONMENT_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly ENVIRONMENT_ROOT
readonly VENV_FOLDER=$ENVIRONMENT_ROOT/.venv
readonly OLDEST_PYTHON=3.10

setup_environment() {
    local -r requirements=$1
    if [[ -n ${PYTHON:-} ]]; then
        environment_use_callers_choice "$requirements"
        return
    fi
    local candidate
    for candidate in python3 python; do
        if environment_python_is_new_enough "$candidate" &&
            environment_missing "$candidate" "$requirements" >/dev/null; then
            PYTHON=$(command -v "$candidate")
            return
        fi
    done
    environment_complete_venv "$requirements"
    PYTHON=$VENV_FOLDER/bin/python
}

environment_log() {
    printf '%s\n' "$*" >&2
}

environment_die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

environment_python_is_new_enough() {
    local -r python=$1
    command -v "$python" >/dev/null &&
        "$python" -c "import sys; sys.exit(sys.version_info < (${OLDEST_PYTHON/./, }))" 2>/dev/null
}

# Prints what PYTHON lacks of the requirements, a line each; fails if there is anything.
environment_missing() {
    local -r python=$1 requirements=$2
    shift 2
    "$python" "$ENVIRONMENT_ROOT/lib/check_requirements.py" "$requirements" "$@"
}

environment_use_callers_choice() {
    local -r requirements=$1
    environment_python_is_new_enough "$PYTHON" ||
        environment_die "PYTHON=$PYTHON is not a Python >= $OLDEST_PYTHON; unset it or name another"
    environment_missing "$PYTHON" "$requirements" >&2 ||
        environment_die "PYTHON=$PYTHON lacks the packages above; install them or unset PYTHON"
}

environment_complete_venv() {
    local -r requirements=$1
    local -r stamp=$VENV_FOLDER/complete-$(basename -- "$requirements").sha256
    local -r python=$VENV_FOLDER/bin/python
    local wanted
    wanted=$(environment_fingerprint "$requirements")
    if [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    # A folder that somebody else filled, or one for requirements that have moved a little, may be
    # complete without a stamp. Only a real import tells.
    if ! { [[ -x $python ]] && environment_missing "$python" "$requirements" --import >/dev/null; }
    then
        environment_install "$requirements"
    fi
    printf '%s\n' "$wanted" >"$stamp"
}

# Of every requirements file, since one names the other.
environment_fingerprint() {
    local -r requirements=$1
    cat -- "$(dirname -- "$requirements")"/requirements*.txt | sha256sum | cut -d ' ' -f 1
}

environment_install() {
    local -r requirements=$1
    local -r python=$VENV_FOLDER/bin/python
    if ! environment_python_is_new_enough "$python"; then
        environment_make_venv
    elif ! "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m ensurepip >&2 || environment_die "$python has no pip; delete $VENV_FOLDER"
    fi
    environment_announce "$requirements"
    if ! "$python" -m pip install --disable-pip-version-check -r "$requirements" >&2; then
        environment_log "" "Still missing in $VENV_FOLDER:"
        environment_missing "$python" "$requirements" >&2 || true
        environment_die "pip could not install everything (see above; without a network, install" \
            "the packages listed into the active Python by other means) - then start again"
    fi
    environment_missing "$python" "$requirements" --import >&2 ||
        environment_die "what pip installed does not work (see above); delete $VENV_FOLDER and" \
            "start again"
}

# What is there instead is an interrupted attempt, or belongs to a Python that is gone or too old.
environment_make_venv() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if environment_python_is_new_enough "$candidate" &&
            "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            environment_log "Making $VENV_FOLDER with $(command -v "$candidate") ..."
            "$candidate" -m venv --clear "$VENV_FOLDER" ||
                environment_die "$candidate could not make $VENV_FOLDER (see above)"
            return
        fi
    done
    environment_die "no Python >= $OLDEST_PYTHON with its venv module found; install one" \
        "(Debian, Ubuntu: apt install python3-venv)"
}

environment_announce() {
    local -r requirements=$1
    local missing
    missing=$(environment_missing "$VENV_FOLDER/bin/python" "$requirements") || true
    environment_log "Installing into $VENV_FOLDER, once (interrupted, it is finished next time):"
    sed -e 's/: .*//' -e 's/^/    /' <<<"$missing" >&2
    if [[ $missing == *torch* ]]; then
        environment_log "torch with CUDA is most of it: about 3 GB to download, 6 GB on disk."
    fi
}
