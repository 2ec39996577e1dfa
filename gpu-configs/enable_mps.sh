#!/bin/bash -p
# Usage: [sudo] ./gpu-configs/enable_mps.sh [options]
#
# Starts the NVIDIA MPS control daemon for you (under sudo: for the user who called sudo).
# Undo: ./gpu-configs/disable_mps.sh
#
#   --exclusive            also set compute mode EXCLUSIVE_PROCESS, so that a process that bypasses MPS
#                          fails loudly; needs root, the only thing here that does
#   --percentage N         default active thread percentage of a client (over 0, up to 100), for MPS
#                          servers that start from then on. It limits, it does not reserve
#   --static-partitions N  cut the multiprocessors into N equal partitions, one for each client's own use,
#                          each of as many whole chunks as are there for all; needs CUDA 13.1's MPS

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

EXCLUSIVE=0
PERCENTAGE=""
PARTITIONS=""
PARTITION_IDS=()
RUNNING=0 # whether the daemon of an earlier time still answers at PIPE
PIPE=""
OPTIONS+=(["--exclusive"]="EXCLUSIVE!" ["--percentage"]=PERCENTAGE ["--static-partitions"]=PARTITIONS)

parse_arguments() {
    cli::parse 0 "$@"
    # the control program ignores what is out of range, without an error
    [[ ${PERCENTAGE:-1} =~ ^(100(\.0{1,3})?|[0-9]{1,2}(\.[0-9]{1,3})?)$ && ${PERCENTAGE:-1} == *[1-9]* ]] ||
        cli::usage_error "--percentage is over 0 and up to 100, not '$PERCENTAGE'"
    [[ ${PARTITIONS:-1} =~ ^[1-9][0-9]?$ ]] ||
        cli::usage_error "--static-partitions is a number from 1 to 99, not '$PARTITIONS'"
    [[ -z $PARTITIONS || -z $PERCENTAGE ]] ||
        cli::usage_error "--static-partitions: a partition is a client's whole share, leave --percentage"
}

check_preconditions() {
    command -v nvidia-cuda-mps-control >/dev/null ||
        die "$EXIT_NO_GPU" "nvidia-cuda-mps-control was not found; it comes with the NVIDIA driver" \
            "(in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
    if [[ ! $GPU_COMPUTE_CAPABILITY =~ ^[0-9]+\.[0-9]$ ]]; then
        warn "nvidia-smi does not tell the compute capability of $(gpu::title); MPS needs 3.5"
    elif ((10#${GPU_COMPUTE_CAPABILITY/./} < 35)); then
        die "$EXIT_UNSUPPORTED" "MPS needs compute capability 3.5; $(gpu::title) has $GPU_COMPUTE_CAPABILITY"
    elif [[ -n $PERCENTAGE ]] && ((10#${GPU_COMPUTE_CAPABILITY/./} < 70)); then
        die "$EXIT_UNSUPPORTED" "MPS passes over --percentage on $(gpu::title): it needs compute capability 7.0"
    fi
    ((!PARTITIONS)) || mps::require_static_partitions
    mig::refuse_on
    require "the compute mode" setting::told "$GPU_COMPUTE_MODE"
    [[ $CURRENT != Prohibited ]] ||
        die "$EXIT_BUSY" "compute mode is Prohibited; if nobody needs it so: sudo nvidia-smi -i $GPU_INDEX -c 0"
    if mps::load && mps::is_up "$PIPE"; then
        RUNNING=1
        log "The MPS daemon at $PIPE answers already."
        check_how_it_was_started
    fi
    mps::refuse_started_by_hand
    ((${#MPS_FOREIGN[@]} == 0)) ||
        die "$EXIT_BUSY" "another user's MPS control daemon is running: $(join "${MPS_FOREIGN[@]}"); only one" \
            "user at a time can share a GPU through MPS, ask its owner to quit it"
    ((!EXCLUSIVE)) || [[ $GPU_COMPUTE_MODE == Exclusive_Process ]] ||
        card::require "changing the compute mode (--exclusive)"
    ((RUNNING)) || check_holders
}

# A daemon has static partitions or not from its start on, and those that are there may be in use.
check_how_it_was_started() {
    local there=""
    IFS=, read -ra PARTITION_IDS <<<"${STATE[partitions]:-}"
    [[ -z ${STATE[partitions]+set} ]] || there=${#PARTITION_IDS[@]}
    [[ $there == "$PARTITIONS" ]] || die "$EXIT_BUSY" "the MPS daemon was started with ${there:-no} static" \
        "partitions; end it first: ./gpu-configs/disable_mps.sh"
}

# Whoever computes next to MPS takes turns with all of its clients together.
check_holders() {
    if ! gpu::find_holders; then
        ((!EXCLUSIVE)) || die "$EXIT_FAILED" \
            "who uses the GPU could not be asked, and --exclusive would shut them out: $NOT_TOLD"
        warn "who uses $(gpu::title) could not be asked: $NOT_TOLD"
    fi
    gpu::print_holders || return 0
    ((!EXCLUSIVE)) || die "$EXIT_BUSY" "the processes above use the GPU without MPS, which --exclusive forbids"
    warn "the processes above use the GPU without MPS and will contend with its clients"
}

# Everything is in a new folder: in /tmp where the path of the socket in it, /pipe/control_privileged, would
# else come to 108 bytes or more. The state is saved before there is anything, so that whatever moment a
# kill comes at can be undone. The daemon's own output goes to a file: it would else hold the caller's
# terminal or pipe open. Where there are several GPUs it is kept to the one, or its server would take memory
# on all.
start_daemon() {
    local folder=$USER_STATE
    local -a settings flags=(-d)
    local -r gone=$PIPE
    ((${#folder} < 70)) || folder=/tmp
    folder+=/mps.$(tr -dc a-z0-9 </dev/urandom | head -c 8 || true)
    PIPE=$folder/pipe
    settings=("CUDA_MPS_PIPE_DIRECTORY=$PIPE" "CUDA_MPS_LOG_DIRECTORY=$folder/log")
    SAVED=("user=$INVOKER_NAME" "uid=$INVOKER_UID" "pipe_directory=$PIPE" "log_directory=$folder/log")
    if ((PARTITIONS)); then
        flags+=(-S)
        SAVED+=("partitions=")
    fi
    state::save mps "${SAVED[@]}"
    if [[ -n $gone ]]; then
        log "note: the MPS daemon of the last time no longer answers; starting a new one in place of its" \
            "pipes at $gone"
        mps::stop "$gone"
    fi
    undo::push mps::stop "$PIPE"
    run as_user mkdir -m 700 -- "$folder" "$PIPE" "$folder/log" ||
        die "$EXIT_PERMISSION" "cannot create $PIPE as $INVOKER_NAME"
    ((GPU_COUNT == 1)) || settings+=("CUDA_VISIBLE_DEVICES=$GPU_UUID")
    # shellcheck disable=SC2016 # the inner shell expands
    run --note "$(quoted "${settings[@]}") nvidia-cuda-mps-control ${flags[*]} (as $INVOKER_NAME)" \
        mps::run "${settings[@]}" bash -p -c '
            ulimit -Sn 16384 2>/dev/null || ulimit -Sn hard
            # else it would hold this lock, and whatever the caller has open, for as long as it runs
            for file in /proc/self/fd/*; do ((${file##*/} < 3)) || eval "exec ${file##*/}>&-"; done
            exec nvidia-cuda-mps-control "$@" </dev/null >"$CUDA_MPS_LOG_DIRECTORY/start.log" 2>&1
        ' start "${flags[@]}" || true # it is the answer that counts
    ((DRY_RUN)) || wait_until mps::is_told up "$PIPE" || {
        as_user tail -n 5 -- "$folder/log/start.log" "$folder/log/control.log" >&2 || true
        die "$EXIT_FAILED" "the MPS daemon did not answer within $WAIT_SECONDS s"
    }
}

make_partitions() {
    local -i i
    local chunks=CHUNKS
    if ((!DRY_RUN)); then
        require "the partitions of the MPS daemon" mps::find_partitions "$PIPE"
        chunks=$((FREE_CHUNKS / PARTITIONS))
        ((chunks > 0)) || die "$EXIT_UNSUPPORTED" "$PARTITIONS static partitions do not fit on $(gpu::title):" \
            "its multiprocessors make $FREE_CHUNKS chunks, and a partition has one at least"
    fi
    for ((i = 1; i <= PARTITIONS; i++)); do
        mps::tell "$PIPE" "sm_partition add $GPU_UUID $chunks"
        ((!DRY_RUN)) || continue
        [[ $ANSWER =~ GPU-[0-9A-Za-z-]+/[0-9A-Za-z+/=_-]+ ]] || die "$EXIT_FAILED" "partition $i of" \
            "$PARTITIONS was not made; the daemon said: $(printable "$ANSWER")"
        PARTITION_IDS+=("${BASH_REMATCH[0]}")
    done
    SAVED[-1]+=$(join "${PARTITION_IDS[@]}")
    state::save mps "${SAVED[@]}"
}

check_partitions() {
    ((!DRY_RUN)) || return 0
    require "the partitions of the MPS daemon" mps::find_partitions "$PIPE"
    ((PARTITION_COUNT == PARTITIONS)) || die "$EXIT_FAILED" "the MPS daemon lists $PARTITION_COUNT static" \
        "partitions, not $PARTITIONS; end it: ./gpu-configs/disable_mps.sh"
}

set_percentage() {
    [[ -n $PERCENTAGE ]] || return 0
    ! mps::is_up "$PIPE" || undo::push mps::tell "$PIPE" "set_default_active_thread_percentage $ACTIVE_THREADS"
    mps::tell "$PIPE" "set_default_active_thread_percentage $PERCENTAGE"
    ((!DRY_RUN)) || return 0
    mps::is_up "$PIPE" || die "$EXIT_FAILED" "the MPS daemon no longer answers"
    # it is told in tenths
    awk -v a="$ACTIVE_THREADS" -v b="$PERCENTAGE" 'BEGIN { exit !((a - b) ^ 2 < 0.01) }' ||
        die "$EXIT_FAILED" "the daemon has an active thread percentage of $ACTIVE_THREADS, not $PERCENTAGE"
}

print_in_force() {
    local sudo="" threads="?"
    ! mps::look "$PIPE" || threads=$ACTIVE_THREADS
    ! state::load compute-mode || sudo="sudo "
    cat <<TEXT
MPS is in force on $(gpu::title)
  daemon:          runs as $INVOKER_NAME and answers; clients have to run as $INVOKER_NAME too
  pipe directory:  $PIPE
  log directory:   ${PIPE%/*}/log
  percentage:      $threads (default active threads of a client)
  compute mode:    $GPU_COMPUTE_MODE
  by hand:         export CUDA_MPS_PIPE_DIRECTORY=$(quoted "$PIPE")
  undo:            $sudo./gpu-configs/disable_mps.sh
TEXT
    ((!PARTITIONS)) || printf '  a client each:   export CUDA_MPS_SM_PARTITION=%s\n' "${PARTITION_IDS[@]}"
}

main() {
    parse_arguments "$@"
    transaction::begin
    gpu::select
    check_preconditions
    ((RUNNING)) || start_daemon
    ((RUNNING || !PARTITIONS)) || make_partitions
    ((!PARTITIONS)) || check_partitions
    set_percentage
    ((!EXCLUSIVE)) || setting::set compute-mode Exclusive_Process
    transaction::end print_in_force
}

main "$@"
