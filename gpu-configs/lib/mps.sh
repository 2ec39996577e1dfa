# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# Questions to MPS control daemons. The control program ends with 0 to nearly everything, so it is the
# answer that counts: a daemon is there when it answers, whatever files lie about, and none is there when
# the program says so. Whatever else it says, it could not be asked.

# The first control program that has static SM partitions; benchmarking/hardware/nvidia_tools.py says the same.
readonly STATIC_PARTITIONS_VERSION=13010

# mps::run [NAME=VALUE...] PROGRAM...: as the invoking user. The caller's own CUDA variables are kept away:
# limits are meant for clients, and under another CUDA_MPS_PROTOCOL_VERSION a daemon answers in other words.
mps::run() {
    local name
    local -a without=()
    for name in "${!CUDA_@}"; do without+=(-u "$name"); done
    as_user env "${without[@]}" "$@"
}

# mps::ask PIPE_DIRECTORY COMMAND: sets ANSWER to what the daemon says.
mps::ask() {
    ANSWER=$(mps::run CUDA_MPS_PIPE_DIRECTORY="$1" timeout --foreground 20 nvidia-cuda-mps-control 2>&1 <<<"$2")
}

# mps::tell PIPE_DIRECTORY COMMAND: a command that changes something. Its answer and its status say
# nothing reliable; the caller asks afterwards.
mps::tell() {
    run --note "echo $2 | CUDA_MPS_PIPE_DIRECTORY=$(quoted "$1") nvidia-cuda-mps-control" mps::ask "$@" || true
}

# mps::look PIPE_DIRECTORY: a question: sets DAEMON to up, gone or unknown, and where it is up
# ACTIVE_THREADS, its default active thread percentage.
mps::look() {
    local status=0
    mps::ask "$1" get_default_active_thread_percentage || status=$?
    DAEMON=unknown
    if [[ $ANSWER == *"Cannot find MPS control daemon"* ]]; then
        DAEMON=gone
    elif [[ $status == 0 && $ANSWER =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
        DAEMON=up
        ACTIVE_THREADS=$ANSWER
    else
        not_told "${ANSWER:-nothing, status $status}"
    fi
}

# mps::is_up PIPE_DIRECTORY: ends the script where that could not be asked.
mps::is_up() {
    require "whether the MPS daemon at $1 runs" mps::look "$1"
    [[ $DAEMON == up ]]
}

# mps::is_told up|gone PIPE_DIRECTORY: whether it is told to be so.
mps::is_told() { mps::look "$2" && [[ $DAEMON == "$1" ]]; }

# mps::stop PIPE_DIRECTORY: ends the daemon there, if any, and removes its folder. `quit` is answered by
# nothing reliable: the daemon is gone when the control program finds none.
mps::stop() {
    mps::look "$1" || true
    if [[ $DAEMON != gone ]]; then
        mps::tell "$1" quit
        ((DRY_RUN)) || wait_until mps::is_told gone "$1" || ! mps::is_up "$1" || die "$EXIT_FAILED" \
            "the MPS daemon at $1 still answers $WAIT_SECONDS s after quit; its log is in ${1%/*}/log"
    fi
    # only a folder of the form that enable_mps.sh creates
    [[ ${1%/*} != */mps.* ]] || run as_user rm -rf -- "${1%/*}"
}

# Ends with 4 where the control program is too old for static partitions.
mps::require_static_partitions() {
    local version=0
    local -r said=$(mps::run timeout 20 nvidia-cuda-mps-control -v 2>&1 </dev/null || true)
    [[ ! $said =~ version:\ *([0-9]{1,9}) ]] || version=${BASH_REMATCH[1]}
    ((10#$version >= STATIC_PARTITIONS_VERSION)) || die "$EXIT_UNSUPPORTED" "static SM partitions need" \
        "nvidia-cuda-mps-control $STATIC_PARTITIONS_VERSION (CUDA 13.1); this one is ${version/#0/of unknown version}"
}

# mps::find_partitions PIPE_DIRECTORY: a question to a daemon with static partitions: sets FREE_CHUNKS, the
# card's chunks that are in no partition, and PARTITION_COUNT. Of a row's columns the first are GPU (its
# UUID's beginning), partition (- in the card's own row), free chunks.
mps::find_partitions() {
    local gpu name free rest
    FREE_CHUNKS=""
    PARTITION_COUNT=0
    mps::ask "$1" lspart || not_told "$ANSWER" || return
    while read -r gpu name free rest; do
        [[ $gpu == GPU-* && $GPU_UUID == "$gpu"* ]] || continue
        if [[ $name != - ]]; then
            PARTITION_COUNT=$((PARTITION_COUNT + 1))
        elif [[ $free =~ ^[0-9]{1,4}$ ]]; then
            FREE_CHUNKS=$free
        fi
    done <<<"$ANSWER"
    [[ -n $FREE_CHUNKS ]] || not_told "$ANSWER"
}

# mps::load: loads the saved state of the daemon that enable_mps.sh started, and sets PIPE; false where there
# is none. Ends with 5 where its folder is shut to its own user: the daemon may run, and only cannot be asked.
mps::load() {
    local folder
    state::load mps || return 1
    PIPE=${STATE[pipe_directory]:-}
    [[ $PIPE == /* ]] || state::damaged mps "no pipe_directory"
    for folder in "${PIPE%/*}" "$PIPE"; do
        ! as_user test -d "$folder" || as_user test -x "$folder" -a -w "$folder" ||
            die "$EXIT_PERMISSION" "$INVOKER_NAME has no permission on the MPS pipe directory: chmod" \
                "u+rwx $(quoted "$folder"), or have its owner give it back"
    done
}

# Ends with 6 where the daemon that enable_mps.sh started answers.
mps::refuse_own() {
    ! mps::load || ! mps::is_up "$PIPE" || die "$EXIT_BUSY" "MPS is on (daemon of user ${STATE[user]:-?});" \
        "switch it off: ./gpu-configs/disable_mps.sh"
}

# mps::find_clients PIPE_DIRECTORY: a question: fills MPS_CLIENTS with pids.
mps::find_clients() {
    local server client
    local -r numbers='^[0-9[:space:]]*$'
    MPS_CLIENTS=()
    mps::ask "$1" get_server_list && [[ $ANSWER =~ $numbers ]] || not_told "$ANSWER" || return
    for server in $ANSWER; do
        mps::ask "$1" "get_client_list $server" || not_told "$ANSWER" || return
        [[ $ANSWER != Server*"not found" ]] || continue # it has ended meanwhile
        [[ $ANSWER =~ $numbers ]] || not_told "$ANSWER" || return
        for client in $ANSWER; do MPS_CLIENTS+=("$client"); done
    done
}

# A question: fills MPS_OWN and MPS_FOREIGN with a readable line for each control daemon of the invoking user
# and of others. A process is a daemon by the name that the kernel gave it (which is the server's, too), by
# its first argument, and by its program; one without further arguments only puts a question.
mps::find_daemons() {
    local listing pid uid name program arguments line
    MPS_OWN=()
    MPS_FOREIGN=()
    listing=$(ps -eo pid=,uid=,comm=,args= 2>/dev/null) || not_told "ps was not found or failed" || return
    while read -r pid uid name program arguments; do
        [[ $name == nvidia-cuda-mps && ${program##*/} == nvidia-cuda-mps-control && -n $arguments ]] || continue
        process::runs "$pid" nvidia-cuda-mps-control || continue
        line="pid $pid"
        ((uid == INVOKER_UID)) || line+=" of user $(process::owner "$pid")"
        # as NVIDIA's manual has it for CUDA 13, unverified on a card
        if [[ " $arguments " == *" -p 3 "* ]] ||
            grep -qz '^CUDA_MPS_PROTOCOL_VERSION=3' "/proc/$pid/environ" 2>/dev/null; then
            line+=" (MPS protocol 3, which answers in other words)"
        fi
        if ((uid == INVOKER_UID)); then MPS_OWN+=("$line"); else MPS_FOREIGN+=("$line"); fi
    done <<<"$listing"
}

# Finds the daemons; ends with 6 where the user has one that enable_mps.sh did not start: more than those
# that it started, on any GPU, and that still answer.
mps::refuse_started_by_hand() {
    local file pipe
    local -i started=0
    require "whether MPS daemons run" mps::find_daemons
    for file in "$USER_STATE"/mps-*.state; do
        pipe=$(as_user sed -n 's/^pipe_directory=//p' "$file" 2>/dev/null) || continue
        [[ -z $pipe ]] || ! mps::is_up "$pipe" || started+=1
    done
    ((${#MPS_OWN[@]} <= started)) ||
        die "$EXIT_BUSY" "a daemon that enable_mps.sh did not start is running ($(join "${MPS_OWN[@]}"));" \
            "end it: echo quit | nvidia-cuda-mps-control, with its CUDA_MPS_PIPE_DIRECTORY"
}
