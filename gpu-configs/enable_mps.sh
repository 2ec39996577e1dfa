#!/bin/bash -p
# Usage: [sudo] ./gpu-configs/enable_mps.sh [options]
#
# Starts the NVIDIA MPS control daemon for you (under sudo: for the user who called sudo), waits until it
# answers, and says what is in force. The state file names its pipe directory.
#
#   --exclusive            also set compute mode EXCLUSIVE_PROCESS, so that a process that bypasses MPS
#                          fails loudly; needs root, the only thing here that does
#   --percentage N         default active thread percentage of a client (over 0, up to 100); counts for
#                          MPS servers that start from then on. It limits, it does not reserve
#   --gpu INDEX_OR_UUID    which GPU (default: the first)
#   --dry-run              print what would be done, change nothing
#   --help                 this text
#
# Environment: GPU_SHARING_STATE_DIR (where the state file goes), GPU_SHARING_WAIT_SECONDS (how long to
# wait for the daemon, default 10).
# Exit codes: 0 in force, 1 failed or could not be asked, 2 usage, 3 no driver or GPU, 4 not supported by
# this GPU, 5 no permission, 6 something else holds the GPU (named). Undo: ./gpu-configs/disable_mps.sh

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

EXCLUSIVE=0
PERCENTAGE=""
RUNNING=0 # whether the daemon of an earlier time answers
PIPE_DIRECTORY=""
LOG_DIRECTORY=""
STALE_FOLDER="" # of an earlier daemon that is gone

OPTIONS+=(["--exclusive"]="EXCLUSIVE!" ["--percentage"]=PERCENTAGE)

# The control program ignores what is out of range, without an error.
is_percentage() {
    [[ $1 =~ ^[0-9]{1,3}(\.[0-9]{1,3})?$ ]] || return 1
    awk -v n="$1" 'BEGIN { exit !(n > 0 && n <= 100) }'
}

check_preconditions() {
    command -v nvidia-cuda-mps-control >/dev/null || die "$EXIT_NO_GPU" \
        "nvidia-cuda-mps-control was not found; it comes with the NVIDIA driver" \
        "(in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
    if [[ $GPU_COMPUTE_CAPABILITY == "[N/A]" ]]; then
        warn "nvidia-smi does not tell the compute capability of $(gpu::title); MPS needs 3.5"
    elif ! awk -v capability="$GPU_COMPUTE_CAPABILITY" 'BEGIN { exit !(capability >= 3.5) }'; then
        die "$EXIT_UNSUPPORTED" "MPS needs compute capability 3.5;" \
            "$(gpu::title) has $GPU_COMPUTE_CAPABILITY"
    fi
    [[ $GPU_MIG_CURRENT != Enabled ]] ||
        die "$EXIT_BUSY" "MIG mode is on, and MPS on top of MIG would need a daemon for each" \
            "instance; switch it off: sudo ./gpu-configs/disable_mig.sh"
    [[ $GPU_COMPUTE_MODE != Prohibited ]] ||
        die "$EXIT_BUSY" "compute mode is Prohibited, nothing can run on $(gpu::title);" \
            "if nobody needs it so: sudo nvidia-smi -i $GPU_INDEX -c DEFAULT"
    find_earlier_daemon
    mps::refuse_other_daemons
    if ((EXCLUSIVE)) && [[ $GPU_COMPUTE_MODE != Exclusive_Process ]]; then
        card::require "changing the compute mode (--exclusive)"
    fi
    ((RUNNING)) || check_holders
}

find_earlier_daemon() {
    mps::load || return 0
    if mps::answers "${STATE[pipe_directory]}"; then
        RUNNING=1
        PIPE_DIRECTORY=${STATE[pipe_directory]}
        LOG_DIRECTORY=${STATE[log_directory]:-}
        log "The MPS daemon at $PIPE_DIRECTORY answers already."
    else
        STALE_FOLDER=${STATE[pipe_directory]%/*}
        log "note: the MPS daemon of the last time no longer answers; starting a new one in place of its" \
            "pipes at ${STATE[pipe_directory]}"
    fi
}

# Whoever computes next to MPS takes turns with all of its clients together.
check_holders() {
    if ! gpu::find_holders; then
        ((!EXCLUSIVE)) || die "$EXIT_FAILED" "who uses $(gpu::title) could not be asked, and --exclusive" \
            "would shut them out; nvidia-smi said: $NOT_TOLD"
        warn "who uses $(gpu::title) could not be asked: $NOT_TOLD"
    fi
    ((${#HOLDERS[@]} > 0)) || return 0
    gpu::print_holders
    ((!EXCLUSIVE)) ||
        die "$EXIT_BUSY" "the processes above use the GPU without MPS, which --exclusive forbids"
    warn "the processes above use the GPU without MPS and will contend with its clients"
}

# Sets PIPE_DIRECTORY and LOG_DIRECTORY below a new folder: in /tmp where the path of the socket in it,
# /pipe/control_privileged, would else come to 108 bytes or more.
choose_folder() {
    local folder parent=$USER_STATE
    ((${#parent} < 70)) || parent=/tmp
    folder=$parent/mps.$(tr -dc a-z0-9 </dev/urandom | head -c 8 || true)
    PIPE_DIRECTORY=$folder/pipe
    LOG_DIRECTORY=$folder/log
}

# The state is saved before there is anything, so that whatever moment a kill comes at can be undone.
start_daemon() {
    choose_folder
    state::keep mps
    state::save mps "user=$INVOKER_NAME" "uid=$INVOKER_UID" "pipe_directory=$PIPE_DIRECTORY" \
        "log_directory=$LOG_DIRECTORY"
    [[ $STALE_FOLDER != */mps.* ]] || run --user rm -rf -- "$STALE_FOLDER"
    undo::push remove_folder
    run --user mkdir -m 700 -- "${PIPE_DIRECTORY%/*}" "$PIPE_DIRECTORY" "$LOG_DIRECTORY" ||
        die "$EXIT_PERMISSION" "cannot create $PIPE_DIRECTORY as $INVOKER_NAME"
    undo::push end_daemon
    launch
    ((!DRY_RUN)) || return 0
    mps::wait_for 0 "$PIPE_DIRECTORY" || {
        as_user tail -n 5 -- "$LOG_DIRECTORY/start.log" "$LOG_DIRECTORY/control.log" >&2 || true
        die "$EXIT_FAILED" "the MPS daemon did not answer within $WAIT_SECONDS s"
    }
}

# The daemon's own output goes to a file: it would else hold the caller's terminal or pipe open. None of
# the caller's CUDA variables reach it: limits are meant for clients, and under another protocol it would
# answer in other words. Where there are several GPUs it is kept to the one, or its server would take
# memory on all of them.
launch() {
    local name
    local -a without=()
    local -a settings=(
        "CUDA_MPS_PIPE_DIRECTORY=$PIPE_DIRECTORY" "CUDA_MPS_LOG_DIRECTORY=$LOG_DIRECTORY"
    )
    for name in "${!CUDA_@}"; do without+=(-u "$name"); done
    ((${#GPU_LINES[@]} == 1)) || settings+=("CUDA_VISIBLE_DEVICES=$GPU_UUID")
    # shellcheck disable=SC2016 # the inner shell expands
    run --user --note "$(quoted "${settings[@]}") nvidia-cuda-mps-control -d (as $INVOKER_NAME)" \
        env "${without[@]}" "${settings[@]}" bash -p -c '
            ulimit -Sn 16384 2>/dev/null || ulimit -Sn hard
            exec nvidia-cuda-mps-control -d </dev/null >"$CUDA_MPS_LOG_DIRECTORY/start.log" 2>&1
        ' || true # it is the answer that counts
}

# Undo for mkdir; a daemon that could not be ended keeps its pipes, or nobody could ever end it.
remove_folder() { ((UNDO_FAILED)) || as_user rm -rf -- "${PIPE_DIRECTORY%/*}"; }

# Undo for launch, which may have been cut short while the daemon was still starting.
end_daemon() {
    local status=0
    mps::probe "$PIPE_DIRECTORY" || status=$?
    ((status != 1)) || return 0
    mps::tell "$PIPE_DIRECTORY" quit
    mps::wait_for 1 "$PIPE_DIRECTORY"
}

set_percentage() {
    [[ -n $PERCENTAGE ]] || return 0
    if ((RUNNING)); then
        mps::answers "$PIPE_DIRECTORY"
        undo::push mps::tell "$PIPE_DIRECTORY" "set_default_active_thread_percentage $MPS_ANSWER"
    fi
    mps::tell "$PIPE_DIRECTORY" "set_default_active_thread_percentage $PERCENTAGE"
    ((!DRY_RUN)) || return 0
    mps::probe "$PIPE_DIRECTORY" || die "$EXIT_FAILED" "the MPS daemon no longer answers"
    awk -v a="$MPS_ANSWER" -v b="$PERCENTAGE" 'BEGIN { exit !(a == b) }' ||
        die "$EXIT_FAILED" "the daemon has an active thread percentage of $MPS_ANSWER, not $PERCENTAGE"
}

print_in_force() {
    local sudo=""
    mps::probe "$PIPE_DIRECTORY" || MPS_ANSWER="?"
    ! state::needs_root mps || sudo="sudo "
    cat <<TEXT
MPS is in force on $(gpu::title)
  daemon:          runs as $INVOKER_NAME and answers; clients have to run as $INVOKER_NAME too
  pipe directory:  $PIPE_DIRECTORY
  log directory:   $LOG_DIRECTORY
  percentage:      $MPS_ANSWER (default active threads of a client)
  compute mode:    $GPU_COMPUTE_MODE
  by hand:         export CUDA_MPS_PIPE_DIRECTORY=$(quoted "$PIPE_DIRECTORY")
  undo:            $sudo./gpu-configs/disable_mps.sh
TEXT
}

main() {
    cli::parse 0 "$@"
    [[ -z $PERCENTAGE ]] || is_percentage "$PERCENTAGE" ||
        cli::usage_error "--percentage is over 0 and up to 100, not '$PERCENTAGE'"
    transaction::begin
    gpu::select
    check_preconditions
    ((RUNNING)) || start_daemon
    set_percentage
    ((!EXCLUSIVE)) || setting::set compute-mode Exclusive_Process
    undo::forget
    unless_dry print_in_force
}

main "$@"
