#!/usr/bin/env bash
# How many jobs can share the GPU. See ./stress_test.sh --help; the work is done by
# benchmarking/stress_test.py, which any Python of the system starts.
set -Eeuo pipefail

script=$(readlink -f -- "${BASH_SOURCE[0]}")
source "${script%/*}/setup_environment.sh"
python=$(environment::any_python)
exec "$python" -I "${script%/*}/benchmarking/stress_test.py" "$@"
