# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with drivers.sh
#
# The machine before anything runs: environment, plan file, output folder, GPU.

# Sets the environment up and reads the plan, if there is one.
driver::set_up() {
    if ((DRY_RUN)); then
        driver::find_python
    else
        environment::set_up "$PROJECT_ROOT/requirements.txt"
    fi
    [[ -z $PLAN ]] || plan::read
}

# driver::prepare DEFAULT_OUTPUT: makes the folder, or takes that of --resume; minds signals from then
# on.
driver::prepare() {
    mode::require_no_other_driver
    if [[ -n $RESUMED ]]; then
        OUTPUT=$RESUMED
        driver::require_nobody_at_work
        signals::install
        mode::undo_left_behind
        return
    fi
    OUTPUT=${OUTPUT:-$1}
    folder::find "$OUTPUT" "*"
    # What was refused before did not use the folder.
    ((${#FOUND[@]} == 0)) || [[ ${FOUND[*]} == "$OUTPUT/$REFUSALS_FILE" ]] ||
        cli::usage_error "--output: $OUTPUT is not empty; name another folder"
    run mkdir -p -- "$OUTPUT" || die "$EXIT_USAGE" "cannot make the folder $OUTPUT; name another" \
        "by --output"
    ((DRY_RUN)) || driver::save_arguments 2>/dev/null ||
        die "$EXIT_USAGE" "cannot write into $OUTPUT; name another folder by --output"
    signals::install
    mode::undo_left_behind
}

driver::save_arguments() {
    printf '%s\0' "${0##*/}" "$PWD" "${COMMAND_WORDS[@]}" >"$OUTPUT/$SAVED_ARGUMENTS"
}

# A suite outlives a driver that was killed.
driver::require_nobody_at_work() {
    local lock
    for lock in "$OUTPUT"/*/run.lock; do
        [[ ! -e $lock ]] || flock --nonblock "$lock" true ||
            die "$EXIT_USAGE" "the suite is still at work in ${lock%/*}; wait for its end, or stop it"
    done
}

driver::find_python() {
    environment::find "$PROJECT_ROOT/requirements.txt" && return
    printf 'would install: requirements.txt into %s\n' "$VENV_FOLDER"
    PYTHON=$VENV_PYTHON
}

# Sets PLAN_CLIENTS, or ends with the plan file's mistakes. Where the environment is yet to be made,
# which only a dry run goes on with, the plan counts as one client.
plan::read() {
    local said
    PLAN_CLIENTS=1
    if ! command -v "$PYTHON" >/dev/null; then
        log "$PLAN is checked once there is an environment; one client is assumed here."
        return
    fi
    said=$("$PYTHON" -c '
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from benchmarking.suite.plan_file import PlanFileError, count_clients
try:
    print(count_clients(Path(sys.argv[2])))
except PlanFileError as error:
    for mistake in error.mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    sys.exit(2)' "$PROJECT_ROOT" "$PLAN") || exit "$EXIT_USAGE"
    PLAN_CLIENTS=$said
}

# Sets HAS_GPU and, with a GPU, everything that gpu::select sets. Ends with 3 where a GPU is asked for
# or there, but cannot be used: only a machine without one gets the CPU demonstration unasked.
machine::inspect() {
    trap 'refusals::note "$?"' EXIT # until signals::install
    if [[ $DEVICE == cpu ]]; then
        log "CPU demonstration, as asked for (--device cpu)."
    elif [[ $DEVICE == auto && -z $GPU_SELECTOR ]] && machine::hides_gpus; then
        log "CPU demonstration: CUDA_VISIBLE_DEVICES hides every GPU."
    elif machine::lists_a_gpu; then
        user::resolve
        [[ -n $GPU_SELECTOR ]] || machine::take_visible
        gpu::select
        HAS_GPU=1
        log "$(gpu::title)"
    elif [[ $DEVICE == cuda || -n $GPU_SELECTOR ]]; then
        die "$EXIT_NO_GPU" "no NVIDIA GPU was found; without --device cuda and --gpu the CPU" \
            "demonstration runs"
    else
        log "No NVIDIA GPU was found: this is the CPU demonstration, no sharing mode is in force."
    fi
}

# machine::visible [FLAG]: what benchmarking/hardware/visible_devices.py makes of CUDA_VISIBLE_DEVICES.
machine::visible() {
    local python
    python=$(environment::any_python) || exit "$EXIT_FAILED"
    "$python" -I "$PROJECT_ROOT/benchmarking/hardware/visible_devices.py" "$@"
}

# Whether the variable hides every GPU; the driver is asked only where the value does not say so alone.
machine::hides_gpus() {
    local visible
    [[ -v CUDA_VISIBLE_DEVICES ]] || return 1
    ! machine::visible --names-none || return 0
    machine::lists_a_gpu || return 1
    visible=$(machine::visible) || exit "$EXIT_NO_GPU"
    [[ -z $visible ]]
}

# Sets GPU_SELECTOR to the first GPU that CUDA would see.
machine::take_visible() {
    local visible
    [[ -v CUDA_VISIBLE_DEVICES ]] || return 0
    visible=$(machine::visible) || exit "$EXIT_NO_GPU"
    case $visible in
        "")
            die "$EXIT_NO_GPU" "CUDA_VISIBLE_DEVICES='$(printable "$CUDA_VISIBLE_DEVICES")' hides every GPU;" \
                "unset it, name a GPU by --gpu, or choose --device cpu"
            ;;
        MIG-*)
            die "$EXIT_USAGE" "CUDA_VISIBLE_DEVICES names the MIG device ${visible%%$'\n'*}, which is not the" \
                "whole card: name the card with --gpu, each client gets an instance of it"
            ;;
        *) GPU_SELECTOR=${visible%%$'\n'*} ;;
    esac
}

# Whether nvidia-smi names any GPU, in whatever place: one that is lost does not hide the others.
machine::lists_a_gpu() {
    local output
    if ! command -v nvidia-smi >/dev/null; then
        [[ ! -e /proc/driver/nvidia/version ]] ||
            die "$EXIT_NO_GPU" "an NVIDIA driver is loaded but nvidia-smi was not found; add it to" \
                "the PATH, or choose --device cpu"
        return 1
    fi
    output=$(gpu::ask -L) || true
    case $'\n'$output in
        *$'\n'"GPU "[0-9]*": "*"(UUID: "*) return 0 ;;
        $'\n' | *"No devices"*) return 1 ;;
    esac
    die "$EXIT_NO_GPU" "nvidia-smi does not answer ($(printable "${output%%$'\n'*}")); mend the driver, or" \
        "choose --device cpu"
}

# machine::mode_name MODE: what a run under the mode may be called here.
machine::mode_name() { ((HAS_GPU)) && printf '%s' "$1" || printf cpu-demo; }
