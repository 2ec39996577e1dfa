#!/usr/bin/env bash
# How many jobs can share the GPU: 1, 2, 4, 6, 8 ... copies at once under one mode, until one fails,
# then the counts between for the exact answer.
# See usage below.
# shellcheck disable=SC2329 # usage is called by the library
set -Eeuo pipefail

# shellcheck source=lib/drivers.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/drivers.sh"

usage() {
    cat <<'HELP'
Usage: ./stress_test.sh [MODE] [MAX] [options]

Runs 1, 2, 4, 6, 8 ... up to MAX jobs at once and prints, for each count, success rate, average
duration, utilization and STP, then the breaking point and what broke: a job out of memory, a crash, a
neighbor's fault, a time limit, or a bound of yours. Past the first count that breaks, those between it
and the last good one are tried. The mode is enabled before and undone after. Without an NVIDIA GPU it
is a demonstration on the CPU.

  MODE                  time-slicing (default), mps or mig
  MAX                   largest count (default: 8); always tried itself

Options:
  --mix training|inference|interactive|mixed|serving   which jobs (default: training); mixed and
                        serving (an inference server with its users, three trainings) go in fours,
                        or the counts would be of different jobs
  --max-slowdown X      a count breaks, too, where a job is slower than alone by more than this factor
  --slo-ms Y            a count breaks, too, where the p99 of a job's response times is above Y ms
                        (--mix inference, interactive, mixed, serving)
  --until-break         go on past MAX by doubling, up to 64 jobs (not under mig)
  --no-bisect           stop at the first count that breaks
HELP
    driver::shared_flags_help
    cat <<'HELP'

With --plan FILE counts go in multiples of its clients, and MAX has to be one.
Defaults: --repeats 1, --output results/stress-<mode>-<date-time>.
Exit codes: 0 done (a breaking point is a result), 1 nothing could be measured, 2 usage, 3 no usable
GPU, 130 Ctrl-C
HELP
}

MODE=""
MAXIMUM=""
MIX=""
RAMP_FLAGS=()
BISECT=1
FAILED=0

main() {
    driver::take_arguments "$@"
    parse_arguments "${COMMAND_WORDS[@]}"
    machine::inspect
    [[ -n $PLAN ]] || require_mode
    driver::set_up
    [[ -z $PLAN ]] || require_plan
    [[ $MODE != mig ]] || layout::require "$MAXIMUM"
    driver::prepare "results/stress-$(machine::mode_name "$MODE")-$(date +%Y%m%d-%H%M%S)"
    enable_mode
    suite::run "$(machine::mode_name "$MODE")" --mode "$MODE" "${JOBS[@]}" --workloads "$COUNTS" \
        --repeats "${REPEATS:-1}" "${RAMP_FLAGS[@]}"
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
                driver::choice "$1" "${2-}" training inference interactive mixed serving && MIX=$2
                CONSUMED=2
                ;;
            --max-slowdown | --slo-ms)
                driver::positive_number "$1" "${2-}" && RAMP_FLAGS+=("$1" "$2")
                CONSUMED=2
                ;;
            --until-break) RAMP_FLAGS+=("$1") ;;
            --no-bisect) BISECT=0 ;;
            -*) driver::flag "$@" ;;
            *) positional_argument "$1" ;;
        esac
        shift "$CONSUMED"
    done
    MODE=${MODE:-time-slicing}
    [[ $MODE != mig || " ${RAMP_FLAGS[*]} " != *" --until-break "* ]] ||
        cli::usage_error "--until-break: under mig there are as many jobs as instances"
    ((!BISECT)) || RAMP_FLAGS+=(--bisect)
    [[ $MODE == mps || ! ${MPS_FLAGS[*]} ]] || cli::usage_error "${MPS_FLAGS[0]} needs MODE mps"
    RAMP_FLAGS+=("${MPS_FLAGS[@]}")
    choose_jobs
}

# Sets JOBS; what a plan's counts are is known only once it can be read.
choose_jobs() {
    if [[ -n $PLAN ]]; then
        [[ -z $MIX ]] || cli::usage_error "--mix and --plan: give one of the two"
        JOBS=(--plan "$PLAN")
        return
    fi
    MIX=${MIX:-training}
    JOBS=(--mix "$MIX")
    [[ $MIX != training || " ${RAMP_FLAGS[*]} " != *" --slo-ms "* ]] ||
        cli::usage_error "--slo-ms needs jobs with response times: --mix inference, interactive, mixed" \
            "or serving"
    if [[ $MIX == mixed || $MIX == serving ]]; then choose_counts 4; else choose_counts 1; fi
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

# choose_counts SIZE: sets COUNTS, separated by commas, and MAXIMUM; the jobs come in groups of SIZE.
choose_counts() {
    local -ri size=$1
    local -i count step=2
    local first=1,
    MAXIMUM=${MAXIMUM:-$((size > 8 ? size : 8 / size * size))}
    if ((size > 1)); then
        ((MAXIMUM % size == 0)) || cli::usage_error "MAX needs to be a multiple of $size: so many jobs" \
            "make the mix once"
        step=size
        first=""
    fi
    COUNTS=$first
    for ((count = step; count < MAXIMUM; count += step)); do COUNTS+=$count,; done
    [[ $COUNTS == "$MAXIMUM," ]] || COUNTS+=$MAXIMUM
    COUNTS=${COUNTS%,}
}

# What another run has left behind may stand in the way until driver::prepare has undone it.
require_mode() {
    local reason
    ((HAS_GPU)) && ! mode::has_state driver || return 0
    reason=$(mode::why_not "$MODE" "$MAXIMUM")
    [[ -z $reason ]] || die "$EXIT_FAILED" "$MODE cannot be used: $reason"
}

# How many jobs there will be is known of a plan only now.
require_plan() {
    choose_counts "$PLAN_CLIENTS"
    require_mode
}

# The mode's script has said why, where it fails.
enable_mode() {
    require_mode
    ((!HAS_GPU)) || mode::enable "$MODE" "$MAXIMUM" || {
        refusals::because "$MODE_REASON"
        exit "${INTERRUPTED:-$EXIT_FAILED}"
    }
}

finish() {
    if ((DRY_RUN)); then
        exit 0
    fi
    log "Report, table and charts: $OUTPUT$(ramp_chart)"
    [[ -z $INTERRUPTED ]] || driver::leave_interrupted
    ((!FAILED)) || exit "$EXIT_FAILED"
    case $SUITE_STATUS in
        0) exit 0 ;;
        1) ! suite::could_not_write && ramp_broke_under_load && exit 0 ;;
        "$EXIT_NO_GPU") exit "$EXIT_NO_GPU" ;;
    esac
    die "$EXIT_FAILED" "$(suite::reason "$SUITE_STATUS") before anything could be compared"
}

# Names the chart, if there is one: a run that was interrupted or broke at once may have none.
ramp_chart() {
    folder::find "$OUTPUT" "*scaling-*.png"
    ((!${#FOUND[@]})) || printf ' (the ramp is %s)' "${FOUND[0]##*/}"
}

# A count that failed is the answer that was looked for, unless already one job fails.
ramp_broke_under_load() { grep -Eq '"last_good_clients": [0-9]' "$OUTPUT/comparison.json"; }

main "$@"
