#!/usr/bin/env bash
# Every check of the project. See usage below.
set -Eeuo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=setup_environment.sh
source ./setup_environment.sh

usage() {
    cat <<'HELP'
Usage: ./run_tests.sh [ARGUMENTS OF PYTEST]

Every check of the project: ruff, shellcheck, then all tests. Sets up what it needs on first use, stops
at the first check that fails, needs no GPU.

  ./run_tests.sh                     everything
  ./run_tests.sh -k metrics -x       arguments are passed on to pytest
  ./run_tests.sh -m gpu              what needs a real GPU
HELP
}

main() {
    case ${1-} in
        -h | --help)
            usage
            return
            ;;
    esac
    environment::set_up "$PWD/requirements-dev.txt"
    # ruff and shellcheck are programs beside the Python that they were installed for.
    PATH=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
    ruff check .
    ruff format --check .
    check_shell_scripts
    exec "$PYTHON" -m pytest "$@"
}

check_shell_scripts() {
    local scripts
    mapfile -t scripts < <(find . .ci/run -type d \( -name '.[a-z]*' -o -name results -o -name data \
        -o -name scratch \) -prune -o -type f \( -name '*.sh' -o -path .ci/run \) -print | sort)
    shellcheck "${scripts[@]}"
    printf 'shellcheck: %d scripts without a finding\n' "${#scripts[@]}"
}

main "$@"
