#!/usr/bin/env bash
# The comparison of the GPU sharing modes, unattended. See ./run_experiments.sh --help; the work is
# done by benchmarking/run_experiments.py, which any Python of the system starts.
set -Eeuo pipefail

script=$(readlink -f -- "${BASH_SOURCE[0]}")
source "${script%/*}/setup_environment.sh"
python=$(environment::any_python)
exec "$python" -I "${script%/*}/benchmarking/run_experiments.py" "$@"
