#!/usr/bin/env bash
# Usage: ./run_tests.sh [ARGUMENTS OF PYTEST]
#
# Every check of the project: ruff, mypy, shellcheck, then all tests. Sets up what it needs on first use,
# stops at the first check that fails, needs no GPU. The files of tests are shared out to several processes;
# tests that use the GPU take turns.
#
#   ./run_tests.sh                     everything
#   ./run_tests.sh -k metrics -x       arguments are passed on to pytest
#   ./run_tests.sh -k metrics -n 0     in one process, which shows prints (-s) at once
#   ./run_tests.sh -m gpu              what needs a real GPU
#   ./run_tests.sh -m download         what downloads a model first (93 MB)

set -Eeuo pipefail

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source ./setup_environment.sh

main() {
    if [[ " $* " =~ \ (-h|--help)\  ]]; then
        sed -n '2,/^$/s/^# \{0,1\}//p' run_tests.sh
        return
    fi
    environment::set_up "$PWD/requirements-dev.txt"
    # ruff, mypy and shellcheck are programs beside the Python that they were installed for.
    PATH=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
    ruff check .
    ruff format --check .
    mypy
    shopt -s globstar
    shellcheck .ci/run ./*.sh gpu-configs/**/*.sh examples/**/*.sh
    # Else each of the many processes that tests start compiles the project anew.
    unset PYTHONDONTWRITEBYTECODE
    # One process more than there are cores, since many tests wait for processes of their own; a bound for
    # large machines, where each further one only imports torch once more. In the order of collection: else
    # a file of one long test would come last, and run alone.
    exec "$PYTHON" -m pytest --numprocesses $(($(nproc) < 8 ? $(nproc) + 1 : 8)) --dist loadfile \
        --no-loadscope-reorder "$@"
}

main "$@"
