# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with drivers.sh
#
# The suite as a child that can be interrupted, and the analysis of what it left.

# suite::run RUN_ID FLAG...: runs the suite into $OUTPUT/RUN_ID, or goes on with the run that is there;
# sets SUITE_STATUS to its exit code.
suite::run() {
    if [[ -n $RESUMED && -e $OUTPUT/$1/manifest.json ]]; then
        suite::resume "$1"
        return
    fi
    # A run that was cut off before its first word has left an empty folder.
    [[ -z $RESUMED || ! -d $OUTPUT/$1 ]] || { rm -f -- "$OUTPUT/$1/run.lock" && rmdir -- "$OUTPUT/$1"; } ||
        true
    local -a command=("$PYTHON" "$PROJECT_ROOT/benchmarking/benchmark_suite.py" "${@:2}"
        --results-dir "$OUTPUT" --run-id "$1" --device "$DEVICE" "${SUITE_FLAGS[@]}")
    ((!HAS_GPU)) || command+=(--gpu "$GPU_UUID")
    [[ -z $MIG_LAYOUT || " $* " != *" --mode mig "* ]] || command+=(--mig-layout "$MIG_LAYOUT")
    suite::execute "${command[@]}"
}

# suite::resume RUN_ID: a run that came to its end, even to a breaking point, is left as it is.
suite::resume() {
    SUITE_STATUS=0
    SUITE_WORDS=""
    ! suite::had_outcome "$1" complete || return 0
    suite::execute "$PYTHON" "$PROJECT_ROOT/benchmarking/benchmark_suite.py" --resume "$OUTPUT/$1"
    if ((SUITE_STATUS == EXIT_USAGE)) && suite::had_outcome "$1" failed; then
        SUITE_STATUS=1
        SUITE_WORDS="" # that there is nothing to go on with is not why it failed
    else
        NOTES+=("it was cut off before its end and went on")
    fi
}

suite::had_outcome() { grep -q "^  \"outcome\": \"$2\"" "$OUTPUT/$1/manifest.json"; }

# suite::execute COMMAND...: runs the suite as a child that gets signals; sets SUITE_STATUS.
suite::execute() {
    local -a command=("$@")
    SUITE_STATUS=0
    SUITE_BEGUN=1
    run --note "$(quoted "${command[@]}")" words::from signals::run_child "${command[@]}" ||
        SUITE_STATUS=$?
    SUITE_WORDS=$WORDS
    if [[ -n $INTERRUPTED ]]; then
        SUITE_STATUS=130
        signals::leave_dead_terminal # its reader may have ended a moment after the signal
    fi
}

# Why the suite ended with this exit code: in its own words, where it said them.
suite::reason() {
    if [[ -n $SUITE_WORDS && $1 != 130 ]]; then
        printf '%s' "$SUITE_WORDS"
        return
    fi
    case $1 in
        1) printf 'a co-run failed' ;;
        2) printf 'the suite refused its arguments' ;;
        3) printf 'the suite found no usable GPU' ;;
        4) printf 'the GPU was not free or the mode not in force' ;;
        5) printf 'there is no proof that the mode was in force' ;;
        130) printf 'interrupted' ;;
        *) printf 'the suite ended with status %s' "$1" ;;
    esac
}

# A disk that is full says nothing of how many jobs the GPU bears.
suite::could_not_write() { [[ $SUITE_WORDS == "cannot write to "* ]]; }

# Ends an interrupted driver; what is done is not lost.
driver::leave_interrupted() {
    log "Interrupted; to go on: ./${0##*/} --resume $(quoted "$OUTPUT")"
    exit "$INTERRUPTED"
}

analysis::run() {
    local -ra command=("$PYTHON" "$PROJECT_ROOT/benchmarking/analyze_results.py"
        --results-dir "$OUTPUT" --each-run)
    run --note "$(quoted "${command[@]}")" words::from "${command[@]}"
}
