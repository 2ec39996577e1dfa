#!/usr/bin/env bash
#
# Starts an MPS control daemon for one user. Any user may do that for their own processes: daemon and
# clients have to run as the same user. Under sudo the daemon, its folders and the state file therefore
# belong to the user who typed the command, and a benchmark started without sudo finds them.

# shellcheck source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=lib/gpu.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/gpu.sh"
# shellcheck source=lib/mps.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/mps.sh"

usage() {
    cat <<'TEXT'
Usage: [sudo] ./gpu-configs/enable_mps.sh [options]

Starts the NVIDIA MPS control daemon for you (under sudo: for the user who called sudo), waits until it
answers, and says what is in force. The state file names its pipe directory.

  --exclusive            also set compute mode EXCLUSIVE_PROCESS, so that a process that bypasses MPS
                         fails loudly; needs root, the only thing here that does
  --percentage N         default active thread percentage of a client (over 0, up to 100); counts for
                         MPS servers that start from then on. It limits, it does not reserve
  --gpu INDEX_OR_UUID    which GPU (default: the first)
  --dry-run              print what would be done, change nothing
  --help                 this text

Environment: GPU_SHARING_STATE_DIR (where the state file goes), GPU_SHARING_WAIT_SECONDS (how long to
wait for the daemon, default 10).
Exit codes: 0 in force, 2 usage, 3 no driver or GPU, 4 not supported by this GPU, 5 no permission,
6 something else holds the GPU (named). Undo: ./gpu-configs/disable_mps.sh
TEXT
}

EXCLUSIVE=0
PERCENTAGE=""
PIPE_DIRECTORY=""
FOLDER="" # of pipes and logs, once it is made

parse_arguments() {
    cli::split "$@"
    set -- "${ARGUMENTS[@]}"
    while (($#)); do
        case $1 in
            --exclusive)
                EXCLUSIVE=1
                CONSUMED=1
                ;;
            --percentage)
                cli::value "$@"
                PERCENTAGE=$VALUE
                CONSUMED=2
                is_percentage "$PERCENTAGE" ||
                    cli::usage_error "--percentage is over 0 and up to 100, not '$PERCENTAGE'"
                ;;
            *) cli::common_flag "$@" ;;
        esac
        shift "$CONSUMED"
    done
}

# The control program ignores what is out of range, without an error.
is_percentage() {
    [[ $1 =~ ^[0-9]{1,3}(\.[0-9]{1,3})?$ ]] || return 1
    awk -v n="$1" 'BEGIN { exit !(n > 0 && n <= 100) }'
}

check_preconditions() {
    command -v nvidia-cuda-mps-control >/dev/null || die "$EXIT_NO_GPU" \
        "nvidia-cuda-mps-control was not found; it comes with the NVIDIA driver" \
        "(in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
    awk -v capability="$GPU_COMPUTE_CAPABILITY" 'BEGIN { exit !(capability >= 3.5) }' ||
        die "$EXIT_UNSUPPORTED" "MPS needs compute capability 3.5;" \
            "$(gpu::title) has $GPU_COMPUTE_CAPABILITY"
    [[ $GPU_MIG_CURRENT != Enabled ]] ||
        die "$EXIT_BUSY" "MIG mode is on, and MPS on top of MIG would need a daemon for each" \
            "instance; switch it off: sudo ./gpu-configs/disable_mig.sh"
    [[ $GPU_COMPUTE_MODE != Prohibited ]] ||
        die "$EXIT_BUSY" "compute mode is Prohibited, nothing can run on $(gpu::title);" \
            "if nobody needs it so: sudo nvidia-smi -i $GPU_INDEX -c DEFAULT"
    ! state::load mps || mps::require_access
    mps::refuse_other_daemons
    read_own_state
    if ((EXCLUSIVE)) && [[ $GPU_COMPUTE_MODE != Exclusive_Process ]]; then
        card::require "changing the compute mode (--exclusive)"
    fi
    check_holders
}

# Whoever computes beside MPS takes turns with all of its clients together.
check_holders() {
    ((!RUNNING)) || return 0
    gpu::find_holders
    ((${#HOLDERS[@]} > 0)) || return 0
    gpu::print_holders
    if ((EXCLUSIVE)); then
        die "$EXIT_BUSY" "the processes above use the GPU without MPS, which --exclusive forbids"
    fi
    warn "the processes above use the GPU without MPS and will contend with its clients"
}

# Sets RUNNING, and PREVIOUS_MODE: the compute mode before any of our changes, also where an earlier
# daemon died without disable_mps.sh.
read_own_state() {
    RUNNING=0
    STALE_FOLDER=""
    PREVIOUS_MODE=$GPU_COMPUTE_MODE
    state::load mps || return 0
    [[ ${STATE[compute_mode]:-} != "$GPU_COMPUTE_MODE" ]] ||
        PREVIOUS_MODE=${STATE[previous_compute_mode]:-$GPU_COMPUTE_MODE}
    if mps::answers "${STATE[pipe_directory]}"; then
        RUNNING=1
        PIPE_DIRECTORY=${STATE[pipe_directory]}
        LOG_DIRECTORY=${STATE[log_directory]:-}
        log "The MPS daemon at $PIPE_DIRECTORY answers already."
    else
        STALE_FOLDER=$(dirname -- "${STATE[pipe_directory]}")
        log "note: the MPS daemon of the last time no longer answers; starting a new one in place of its" \
            "pipes at ${STATE[pipe_directory]}"
    fi
}

# Makes FOLDER, a new one with a short enough name: a socket's path has to stay under 108 bytes. FOLDER
# is set to nothing else, so that only what was made here is ever removed.
make_folder() {
    local parent template
    for parent in "$STATE_DIRECTORY" "/run/user/$INVOKER_UID" /tmp; do
        template=$parent/mps.XXXXXXXX
        ((${#template} + ${#SOCKET} < 108)) || continue
        if [[ $parent == "$STATE_DIRECTORY" ]]; then
            state::require_own_directory
            as_user test -d "$parent" || run --user mkdir -p -m 700 -- "$parent" ||
                die "$EXIT_PERMISSION" "cannot write $parent as $INVOKER_NAME;" \
                    "set GPU_SHARING_STATE_DIR to a folder that this user may write"
        else
            as_user test -w "$parent" || continue
        fi
        if ((DRY_RUN)); then
            run --user mktemp -d -- "$template"
            FOLDER=$template
        else
            FOLDER=$(run --user mktemp -d -- "$template") ||
                die "$EXIT_PERMISSION" "cannot write $parent as $INVOKER_NAME;" \
                    "set GPU_SHARING_STATE_DIR to a folder that this user may write"
        fi
        return 0
    done
    die "$EXIT_FAILED" "$STATE_DIRECTORY is too long for a socket; set GPU_SHARING_STATE_DIR"
}
readonly SOCKET=/pipe/control_privileged

start_daemon() {
    ((!RUNNING)) || return 0
    undo::push remove_folder
    make_folder
    PIPE_DIRECTORY=$FOLDER/pipe
    LOG_DIRECTORY=$FOLDER/log
    undo::push state::put_back mps "$(state::text mps)"
    save_state "$GPU_COMPUTE_MODE"
    remove_stale_folder
    run --user mkdir -m 700 -- "$PIPE_DIRECTORY" "$LOG_DIRECTORY" ||
        die "$EXIT_PERMISSION" "cannot create $FOLDER as $INVOKER_NAME"
    undo::push end_daemon
    launch
    ((DRY_RUN)) && return 0
    mps::wait_until_answers "$PIPE_DIRECTORY" || {
        as_user tail -n 5 -- "$LOG_DIRECTORY/start.log" "$LOG_DIRECTORY/control.log" >&2 || true
        die "$EXIT_FAILED" "the MPS daemon did not answer within $WAIT_SECONDS s"
    }
}

# The daemon's own output goes to a file: it would else hold the caller's terminal or pipe open. Its
# environment carries none of the limits that are meant for clients. Where there are several GPUs it is
# kept to the one, or its server would take memory on all of them.
launch() {
    local -a settings=(
        "CUDA_MPS_PIPE_DIRECTORY=$PIPE_DIRECTORY" "CUDA_MPS_LOG_DIRECTORY=$LOG_DIRECTORY"
    )
    local -a without=(
        -u CUDA_VISIBLE_DEVICES -u CUDA_MPS_ACTIVE_THREAD_PERCENTAGE -u CUDA_MPS_CLIENT_PRIORITY
        -u CUDA_MPS_PINNED_DEVICE_MEM_LIMIT
    )
    ((${#GPU_LINES[@]} == 1)) || settings+=("CUDA_VISIBLE_DEVICES=$GPU_UUID")
    # shellcheck disable=SC2016 # the inner shell expands
    run --user --note "$(quoted "${settings[@]}") nvidia-cuda-mps-control -d (as $INVOKER_NAME)" \
        env "${without[@]}" "${settings[@]}" bash -c '
            hard=$(ulimit -Hn)
            [[ $hard != unlimited ]] && ((hard < 16384)) || hard=16384
            soft=$(ulimit -Sn)
            [[ $soft == unlimited ]] || ((soft >= hard)) || ulimit -Sn "$hard"
            exec nvidia-cuda-mps-control -d </dev/null >"$CUDA_MPS_LOG_DIRECTORY/start.log" 2>&1
        ' || log "nvidia-cuda-mps-control -d ended with status $?"
}

# Interrupted, the start may still be under way: a daemon that answers a moment later shall not stay.
end_daemon() {
    mps::wait_until_answers "$PIPE_DIRECTORY" 2 || return 0
    mps::quit "$PIPE_DIRECTORY"
}

remove_folder() { [[ -z $FOLDER ]] || run --user rm -rf -- "$FOLDER"; }

remove_stale_folder() {
    [[ ${STALE_FOLDER##*/} == mps.* ]] || return 0
    run --user rm -rf -- "$STALE_FOLDER"
}

# save_state COMPUTE_MODE
save_state() {
    state::save mps "gpu_uuid=$GPU_UUID" "user=$INVOKER_NAME" "uid=$INVOKER_UID" \
        "pipe_directory=$PIPE_DIRECTORY" "log_directory=$LOG_DIRECTORY" \
        "previous_compute_mode=$PREVIOUS_MODE" "compute_mode=$1"
}

set_percentage() {
    local before now
    [[ -n $PERCENTAGE ]] || return 0
    if ((RUNNING)); then
        before=$(mps::percentage "$PIPE_DIRECTORY")
        undo::push mps::tell "$PIPE_DIRECTORY" "set_default_active_thread_percentage $before"
    fi
    mps::tell "$PIPE_DIRECTORY" "set_default_active_thread_percentage $PERCENTAGE"
    ((DRY_RUN)) && return 0
    now=$(mps::percentage "$PIPE_DIRECTORY") || die "$EXIT_FAILED" "the MPS daemon no longer answers"
    awk -v a="$now" -v b="$PERCENTAGE" 'BEGIN { exit !(a == b) }' ||
        die "$EXIT_FAILED" "the daemon has an active thread percentage of $now, not $PERCENTAGE"
}

set_exclusive() {
    ((EXCLUSIVE)) && [[ $GPU_COMPUTE_MODE != Exclusive_Process ]] || return 0
    ((!RUNNING)) || undo::push state::put_back mps "$(state::text mps)"
    save_state Exclusive_Process
    undo::push gpu::put_back_compute_mode "$GPU_COMPUTE_MODE"
    gpu::change_compute_mode Exclusive_Process
    ((DRY_RUN)) && return 0
    gpu::refresh
    [[ $GPU_COMPUTE_MODE == Exclusive_Process ]] ||
        card::failed "the compute mode is $GPU_COMPUTE_MODE, not Exclusive_Process"
}

print_in_force() {
    if ((DRY_RUN)); then
        printf 'Dry run: nothing was changed.\n'
        return 0
    fi
    cat <<TEXT
MPS is in force on $(gpu::title)
  daemon:          runs as $INVOKER_NAME and answers; clients have to run as $INVOKER_NAME too
  pipe directory:  $PIPE_DIRECTORY
  log directory:   $LOG_DIRECTORY
  percentage:      $(mps::percentage "$PIPE_DIRECTORY") (default active threads of a client)
  compute mode:    $GPU_COMPUTE_MODE
  by hand:         export CUDA_MPS_PIPE_DIRECTORY=$(quoted "$PIPE_DIRECTORY")
  undo:            $(undo_command)
TEXT
}

undo_command() {
    [[ $GPU_COMPUTE_MODE == "$PREVIOUS_MODE" ]] || printf 'sudo '
    printf './gpu-configs/disable_mps.sh'
}

main() {
    parse_arguments "$@"
    transaction::begin
    user::resolve
    gpu::select
    check_preconditions
    start_daemon
    set_percentage
    set_exclusive
    undo::forget
    print_in_force
}

main "$@"
