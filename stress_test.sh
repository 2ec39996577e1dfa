#!/usr/bin/env bash
# How many jobs can share the GPU: 1, 2, 4, 6, 8 ... copies at once under one mode, until one fails.
# See usage below.
# shellcheck disable=SC2329 # usage is called by the library
set -Eeuo pipefail

# shellcheck source=lib/drivers.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/drivers.sh"

usage() {
    cat <<'HELP'
Usage: ./stress_test.sh [MODE] [MAX] [options]

Runs 1, 2, 4, 6, 8 ... up to MAX jobs at once and prints, for each count, success rate, average
duration, utilization and STP, then the breaking point and what broke. The mode is enabled before and
undone after. Without an NVIDIA GPU it is a demonstration on the CPU.

  MODE                  time-slicing (default), mps or mig
  MAX                   largest count (default: 8); always tried itself

Options:
  --mix training|inference|interactive|mixed   which jobs (default: training); mixed counts go in
                        fours, or the counts would be of different jobs
HELP
    driver::shared_flags_help
    cat <<'HELP'

Defaults: --repeats 1, --output results/stress-<mode>-<date-time>.
Exit codes: 0 done (a breaking point is a result), 1 nothing could be measured, 2 usage, 3 no usable
GPU, 130 Ctrl-C
HELP
}

MODE=""
MAXIMUM=""
MIX=training
FAILED=0

main() {
    parse_arguments "$@"
    choose_counts
    machine::inspect
    require_mode
    driver::prepare "results/stress-$(machine::mode_name "$MODE")-$(date +%Y%m%d-%H%M%S)"
    enable_mode
    suite::run "$(machine::mode_name "$MODE")" --mode "$MODE" --mix "$MIX" --workloads "$COUNTS" \
        --repeats "${REPEATS:-1}"
    mode::undo || FAILED=1
    analysis::run || FAILED=1
    finish
}

parse_arguments() {
    cli::split "$@"
    set -- "${ARGUMENTS[@]}"
    while (($#)); do
        CONSUMED=1
        case $1 in
            --mix)
                driver::choice "$1" "${2-}" training inference interactive mixed && MIX=$2
                CONSUMED=2
                ;;
            -*) driver::flag "$@" ;;
            *) positional_argument "$1" ;;
        esac
        shift "$CONSUMED"
    done
    MODE=${MODE:-time-slicing}
    MAXIMUM=${MAXIMUM:-8}
}

positional_argument() {
    if [[ -z $MODE ]]; then
        driver::choice MODE "$1" time-slicing mps mig && MODE=$1
    elif [[ -z $MAXIMUM ]]; then
        driver::positive_integer MAX "$1" && MAXIMUM=$1
    else
        cli::usage_error "unexpected argument: $1"
    fi
}

# Sets COUNTS, separated by commas.
choose_counts() {
    local -i count step=2
    local first=1,
    if [[ $MIX == mixed ]]; then
        ((MAXIMUM % 4 == 0)) || cli::usage_error "MAX needs to be a multiple of four for --mix mixed"
        step=4
        first=""
    fi
    COUNTS=$first
    for ((count = step; count < MAXIMUM; count += step)); do COUNTS+=$count,; done
    [[ $COUNTS == "$MAXIMUM," ]] || COUNTS+=$MAXIMUM
    COUNTS=${COUNTS%,}
}

require_mode() {
    local reason
    ((HAS_GPU)) || return 0
    reason=$(mode::why_not "$MODE" "$MAXIMUM")
    [[ -z $reason ]] || die "$EXIT_FAILED" "$MODE cannot be used: $reason"
}

# The mode's script has said why, where it fails.
enable_mode() {
    ((!HAS_GPU)) || mode::enable "$MODE" "$MAXIMUM" || exit "${INTERRUPTED:-$EXIT_FAILED}"
}

finish() {
    if ((DRY_RUN)); then
        exit 0
    fi
    log "Report, table and charts: $OUTPUT (the ramp is scaling-$MIX.png)"
    [[ -z $INTERRUPTED ]] || exit "$INTERRUPTED"
    ((!FAILED)) || exit "$EXIT_FAILED"
    case $SUITE_STATUS in
        0) exit 0 ;;
        1) ramp_broke_under_load && exit 0 ;;
        "$EXIT_NO_GPU") exit "$EXIT_NO_GPU" ;;
    esac
    die "$EXIT_FAILED" "$(suite::reason "$SUITE_STATUS") before anything could be compared"
}

# A count that failed is the answer that was looked for, unless already one job fails.
ramp_broke_under_load() { grep -Eq '"last_good_clients": [0-9]' "$OUTPUT/comparison.json"; }

main "$@"
