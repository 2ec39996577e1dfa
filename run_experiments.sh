#!/usr/bin/env bash
# The comparison of the GPU sharing modes, unattended: each job alone, then the same mix of jobs
# together under time slicing, MPS and MIG, then the report. See usage below.
# shellcheck disable=SC2329 # functions are handed to phase, and usage is called by the library
set -Eeuo pipefail

# shellcheck source=lib/drivers.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/drivers.sh"

usage() {
    cat <<'HELP'
Usage: ./run_experiments.sh [options]

Phase 1 baseline       each job of the mix alone
Phase 2 time-slicing   the mix together, as CUDA does by itself
Phase 3 mps            the mix together under NVIDIA MPS
Phase 4 mig            each job on a MIG instance of its own (where MIG is on, or with --mig)
Phase 5 analysis       decision, table, charts: report.html, report.md

Without an NVIDIA GPU phases 1 and 2 run as a small demonstration on the CPU. A phase that fails does
not stop the others; Ctrl-C stops, undoes what was enabled and reports what was done.

Options:
  --modes LIST          which of time-slicing,mps,mig (default: all)
  --mix mixed|training|inference|interactive|serving|pairs   which jobs (default: mixed: ResNet50
                        training, batch inference, Jupyter session, BERT fine-tuning; serving: an
                        inference server with its users, three ResNet50 trainings; pairs: each job of
                        the mixed mix beside each other one, 10 s a pair)
  --workloads N         jobs that run together (default: 4; with --plan: its clients once)
  --phase-minutes N     budget of each phase (default: 5 for phase 1, 10 for the others); it limits
                        repeats, never below one
  --noise-floor         measure the first mode that runs twice: differences between modes that are no
                        larger than those between its two runs are called noise
  --baseline RUN        folder of an earlier baseline run to use in place of phase 1
HELP
    driver::shared_flags_help
    cat <<'HELP'

Defaults: --repeats 3 (CPU: 1), --output results/experiments-<date-time>.
Exit codes: 0 every phase that ran succeeded, 1 one failed, 2 usage, 3 no usable GPU, 130 Ctrl-C
HELP
}

MODES=time-slicing,mps,mig
MIX=""
WORKLOADS=""
PHASE_MINUTES=""
NOISE_FLOOR=0
BASELINE="" # run folder: an earlier one's, or phase 1's once it is complete
NO_GPU=0    # the suite found that the GPU cannot be used
FAILED_PHASES=0

main() {
    driver::take_arguments "$@"
    parse_arguments "${COMMAND_WORDS[@]}"
    machine::inspect
    driver::set_up
    choose_workloads
    driver::prepare "results/experiments-$(date +%Y%m%d-%H%M%S)"
    phase 1 baseline measure_baseline
    phase 2 "$(machine::mode_name time-slicing)" measure_mode time-slicing
    phase 3 mps measure_mode mps
    phase 4 mig measure_mode mig
    phase 5 analysis analyze
    finish
}

parse_arguments() {
    cli::split "$@"
    set -- "${ARGUMENTS[@]}"
    while (($#)); do
        CONSUMED=2
        case $1 in
            --modes) cli::value "$@" && check_modes "$VALUE" && MODES=$VALUE ;;
            --mix)
                driver::choice "$1" "${2-}" mixed training inference interactive serving pairs && MIX=$2
                ;;
            --noise-floor) NOISE_FLOOR=1 && CONSUMED=1 ;;
            --workloads) driver::positive_integer "$1" "${2-}" && WORKLOADS=$2 ;;
            --phase-minutes) check_minutes "${2-}" && PHASE_MINUTES=$2 ;;
            --baseline)
                driver::path "$@"
                [[ -e $VALUE/manifest.json ]] || cli::usage_error "--baseline: '$VALUE' is no run folder"
                BASELINE=$VALUE
                ;;
            *) driver::flag "$@" ;;
        esac
        shift "$CONSUMED"
    done
    [[ -z $MIX || -z $PLAN ]] || cli::usage_error "--mix and --plan: give one of the two"
    [[ $MIX != pairs || -z $WORKLOADS ]] ||
        cli::usage_error "--mix pairs has two jobs in each co-run: leave --workloads"
}

# A layout has an instance for each job, so it says how many there are, unless the user does.
choose_workloads() {
    local usual=${PLAN_CLIENTS:-4}
    [[ $MIX != pairs ]] || usual=2
    [[ -z $MIG_LAYOUT ]] || usual=$(layout::count)
    WORKLOADS=${WORKLOADS:-$usual}
    [[ ,$MODES, != *,mig,* ]] || layout::require "$WORKLOADS"
}

check_modes() {
    local mode modes
    IFS=, read -ra modes <<<"$1,"
    for mode in "${modes[@]}"; do driver::choice --modes "$mode" time-slicing mps mig; done
}

check_minutes() {
    [[ $1 =~ ^[0-9]+(\.[0-9]+)?$ && $1 =~ [1-9] ]] ||
        cli::usage_error "--phase-minutes needs a number of minutes over 0"
}

# --- phases -------------------------------------------------------------------------------------------

# phase NUMBER NAME ACTION...: runs one phase and appends its outcome to phases.jsonl. The action sets
# PHASE_STATUS and PHASE_REASON by skip or fail, and PHASE_RUN, the name of its run's folder.
phase() {
    local -r number=$1 name=$2
    local -i NOW started
    local note
    clock::read
    started=NOW
    PHASE_STATUS=ok
    PHASE_REASON=""
    PHASE_RUN=""
    NOTES=()
    log $'\n'"Phase $number: $name"
    if [[ $name != analysis ]] && was_ok "$number"; then
        log "Phase $number: $name: done before"
        [[ $name != baseline ]] || BASELINE=$OUTPUT/baseline
        return
    fi
    if [[ -n $INTERRUPTED && $name != analysis ]]; then
        skip "interrupted before it began"
    elif ((NO_GPU)) && [[ $name != analysis ]]; then
        skip "the GPU cannot be used"
    else
        "${@:3}"
        [[ -z $INTERRUPTED || $PHASE_STATUS != ok || $name == analysis ]] || fail interrupted
        for note in "${NOTES[@]}"; do PHASE_REASON+=${PHASE_REASON:+; }$note; done
    fi
    if ((!DRY_RUN)) || [[ $PHASE_STATUS != ok ]]; then
        log "Phase $number: $name: $PHASE_STATUS${PHASE_REASON:+ ($PHASE_REASON)}"
    fi
    clock::read
    record_phase "$number" "$name" $((NOW - started)) 2>/dev/null || die "$EXIT_FAILED" \
        "cannot write $OUTPUT/phases.jsonl; make room or bring it back, then ./run_experiments.sh" \
        "--resume $(quoted "$OUTPUT")"
}

# was_ok NUMBER: whether a run that goes on has had this phase; its last line counts.
was_ok() {
    [[ -n $RESUMED && -e $OUTPUT/phases.jsonl ]] &&
        grep "^{\"phase\":$1,.*}\$" "$OUTPUT/phases.jsonl" | tail -n 1 | grep -q '"status":"ok"'
}

skip() {
    PHASE_STATUS=skipped
    PHASE_REASON=$1
}

fail() {
    PHASE_STATUS=failed
    PHASE_REASON=$1
    FAILED_PHASES=$((FAILED_PHASES + 1))
}

# record_phase NUMBER NAME SECONDS
record_phase() {
    ((!DRY_RUN)) || return 0
    [[ -n $PHASE_RUN && -e $OUTPUT/$PHASE_RUN ]] || PHASE_RUN=""
    line::append "$OUTPUT/phases.jsonl" "$(
        printf '{"phase":%d,"name":"%s","status":"%s","reason":"%s","run_folder":"%s","seconds":%d}' \
            "$1" "$2" "$PHASE_STATUS" "$(json::text "$PHASE_REASON")" "$PHASE_RUN" "$3"
    )"
}

measure_baseline() {
    local reason=""
    ((!HAS_GPU)) || reason=$(mode::why_not exclusive 1)
    if [[ -n $BASELINE ]]; then
        skip "the baseline of $BASELINE is used"
    elif [[ -n $reason ]]; then
        skip "$reason; each job runs alone on its instance in phase 4"
    else
        run_suite exclusive 5
        [[ $PHASE_STATUS != ok ]] || BASELINE=$OUTPUT/baseline
    fi
}

# measure_mode MODE: without a GPU the first phase is a demonstration of the flow, whatever was asked.
measure_mode() {
    local -r mode=$1
    local reason
    if ((!HAS_GPU)) && [[ $mode == time-slicing ]]; then
        run_suite "${MODES%%,*}" 10
        measure_again "${MODES%%,*}"
        return
    elif [[ ,$MODES, != *",$mode,"* ]]; then
        skip "not asked for (--modes $MODES)"
        return
    fi
    reason=$(mode::why_not "$mode" "$WORKLOADS")
    if [[ -n $reason ]]; then
        skip "$reason"
    elif mode::enable "$mode" "$WORKLOADS"; then
        run_suite "$mode" 10
        measure_again "$mode"
    else
        fail "${MODE_REASON:-the mode could not be enabled}"
    fi
    mode::undo || fail "$MODE_REASON"
}

# measure_again MODE: the noise floor, where it was asked for and no other mode has it.
measure_again() {
    local -r first_run=$PHASE_RUN
    ((NOISE_FLOOR)) && [[ $PHASE_STATUS == ok && -z $INTERRUPTED ]] || return 0
    folder::find "$OUTPUT" "*-again/manifest.json"
    ((!${#FOUND[@]})) || [[ ${FOUND[0]} == "$OUTPUT/$first_run-again/"* ]] || return 0
    run_suite "$1" 10 -again
    PHASE_RUN=$first_run
}

# run_suite MODE DEFAULT_MINUTES [SUFFIX]: one run of the suite; later runs reuse the baseline of the first.
run_suite() {
    local -r mode=$1 minutes=${PHASE_MINUTES:-$2}
    local -a flags=(--mode "$mode" --budget-minutes "$minutes")
    [[ $MIX == pairs ]] || flags+=(--workloads "$WORKLOADS")
    [[ -z $PLAN ]] && flags+=(--mix "${MIX:-mixed}") || flags+=(--plan "$PLAN")
    [[ $mode != mps ]] || flags+=("${MPS_FLAGS[@]}")
    PHASE_RUN=$(machine::mode_name "$mode")${3-}
    if [[ $mode == exclusive ]]; then
        PHASE_RUN=baseline
    else
        flags+=(--repeats "${REPEATS:-$( ((HAS_GPU)) && printf 3 || printf 1)}")
        [[ -z $BASELINE ]] || flags+=(--baseline "$BASELINE")
    fi
    suite::run "$PHASE_RUN" "${flags[@]}"
    ((SUITE_STATUS != EXIT_NO_GPU)) || NO_GPU=1
    ((SUITE_STATUS == 0)) || fail "$(suite::reason "$SUITE_STATUS")"
}

analyze() {
    folder::find "$OUTPUT" "*/manifest.json"
    if ((${#FOUND[@]} > 0 || DRY_RUN)); then
        analysis::run || fail "${WORDS:-the analysis ended with status $?}"
    else
        skip "no phase left a run"
    fi
}

finish() {
    if ((DRY_RUN)); then
        exit 0
    fi
    log $'\n'"Results: $OUTPUT (phases.jsonl says what each phase did)"
    [[ -z $INTERRUPTED ]] || driver::leave_interrupted
    ((!NO_GPU)) || exit "$EXIT_NO_GPU"
    exit $((FAILED_PHASES > 0))
}

main "$@"
