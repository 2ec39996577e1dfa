# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# Questions to MPS control daemons. The control program ends with 0 to nearly everything, so it is the
# answer that counts: a daemon is there when it answers, whatever files lie about, and none is there when
# the program says so. Whatever else it says, it could not be asked.

readonly MPS_QUESTION=get_default_active_thread_percentage

# mps::ask PIPE_DIRECTORY COMMAND: prints the daemon's answer. The caller's own CUDA variables, such as
# CUDA_MPS_PROTOCOL_VERSION, are kept away.
mps::ask() {
    local name
    local -a without=()
    for name in "${!CUDA_@}"; do without+=(-u "$name"); done
    printf '%s\n' "$2" | as_user env "${without[@]}" CUDA_MPS_PIPE_DIRECTORY="$1" \
        timeout 20 nvidia-cuda-mps-control 2>&1
}

# mps::tell PIPE_DIRECTORY COMMAND: a command that changes something. Its answer and its status say
# nothing reliable; the caller asks afterwards.
mps::tell() {
    local -r where=CUDA_MPS_PIPE_DIRECTORY=$(quoted "$1")
    run --note "echo $2 | $where nvidia-cuda-mps-control" mps::tell_quietly "$@" || true
}

mps::tell_quietly() { mps::ask "$@" >/dev/null; }

# mps::probe PIPE_DIRECTORY: 0 where a daemon answers (MPS_ANSWER is its default active thread percentage),
# 1 where there is none, 2 where it could not be asked (MPS_ANSWER is what was said).
mps::probe() {
    local status=0
    MPS_ANSWER=$(mps::ask "$1" "$MPS_QUESTION") || status=$?
    ((status != 0)) || [[ ! $MPS_ANSWER =~ ^[0-9]+(\.[0-9]+)?$ ]] || return 0
    [[ $MPS_ANSWER != *"Cannot find MPS control daemon"* ]] || return 1
    MPS_ANSWER=$(printable "${MPS_ANSWER:-nothing, status $status}")
    return 2
}

# mps::answers PIPE_DIRECTORY: the same, and ends the script where it could not be asked.
mps::answers() {
    local status=0
    mps::probe "$1" || status=$?
    ((status != 2)) || die "$EXIT_FAILED" "the MPS daemon at $1 could not be asked whether it runs" \
        "(nvidia-cuda-mps-control said: $MPS_ANSWER)"
    return "$status"
}

# mps::wait_for STATUS PIPE_DIRECTORY: waits until mps::probe gives that status.
mps::wait_for() {
    local -i status tenths
    for ((tenths = 0; tenths <= 10 * WAIT_SECONDS; tenths++)); do
        status=0
        mps::probe "$2" || status=$?
        ((status != $1)) || return 0
        ((status != 2)) || tenths+=10 # a question that fails may have taken its whole time
        sleep 0.1
    done
    return 1
}

# mps::load: loads the saved state of the daemon that enable_mps.sh started; false where there is none.
# Ends with 5 where its folder is shut to its own user: the daemon may run, and only cannot be asked.
mps::load() {
    local folder
    state::load mps || return 1
    [[ ${STATE[pipe_directory]:-} == /* ]] ||
        die "$EXIT_FAILED" "$(state::file mps) is damaged (no pipe_directory); look at it and remove it"
    for folder in "${STATE[pipe_directory]%/*}" "${STATE[pipe_directory]}"; do
        ! as_user test -d "$folder" || as_user test -x "$folder" -a -w "$folder" ||
            die "$EXIT_PERMISSION" "$INVOKER_NAME has no permission on the MPS pipe directory: chmod" \
                "u+rwx $(quoted "$folder"), or have its owner give it back"
    done
}

# mps::refuse_own: ends with 6 where the daemon that enable_mps.sh started answers.
mps::refuse_own() {
    ! mps::load || ! mps::answers "${STATE[pipe_directory]}" ||
        die "$EXIT_BUSY" "MPS is on (daemon of user ${STATE[user]:-?});" \
            "switch it off: ./gpu-configs/disable_mps.sh"
}

# mps::find_clients PIPE_DIRECTORY: fills MPS_CLIENTS with pids; false, with NOT_TOLD, where the daemon
# could not be asked.
mps::find_clients() {
    local line
    MPS_CLIENTS=()
    mps::numbers "$1" get_server_list || return 1
    for line in "${NUMBERS[@]}"; do
        mps::numbers "$1" "get_client_list $line" || return 1
        MPS_CLIENTS+=("${NUMBERS[@]}")
    done
}

# mps::numbers PIPE_DIRECTORY COMMAND: fills NUMBERS from an answer that has one a line. A server that has
# ended meanwhile is "not found".
mps::numbers() {
    local answer line status=0
    NUMBERS=()
    answer=$(mps::ask "$1" "$2") || status=$?
    while IFS= read -r line; do
        [[ ! $line =~ ^\ *[0-9]+\ *$ ]] || NUMBERS+=("${line// /}")
        [[ -z $line || $line =~ ^\ *[0-9]+\ *$ || $line == Server*"not found" ]] || status=1
    done <<<"$answer"
    NOT_TOLD=$(printable "${answer:-nothing, status $status}")
    return "$((status != 0))"
}

# Fills MPS_OWN and MPS_FOREIGN with a readable line for each control daemon of the invoking user and of
# others. False, with NOT_TOLD, where processes cannot be listed.
#
# A process is a daemon by the name that the kernel gave it (which is the server's, too), by its first
# argument, and by its program.
mps::find_daemons() {
    local listing pid uid name program arguments line
    MPS_OWN=()
    MPS_FOREIGN=()
    NOT_TOLD="ps was not found or failed"
    listing=$(ps -eo pid=,uid=,comm=,args= 2>/dev/null) || return 1
    while read -r pid uid name program arguments; do
        [[ $name == nvidia-cuda-mps && ${program##*/} == nvidia-cuda-mps-control ]] || continue
        process::runs "$pid" nvidia-cuda-mps-control || continue
        line="pid $pid"
        ((uid == INVOKER_UID)) || line+=" of user $(gpu::owner "$pid")"
        ! mps::is_protocol_3 "$pid" "$arguments" || line+=" (MPS protocol 3, which answers in other words)"
        if ((uid == INVOKER_UID)); then MPS_OWN+=("$line"); else MPS_FOREIGN+=("$line"); fi
    done <<<"$listing"
}

# mps::is_protocol_3 PID ARGUMENTS: as NVIDIA's manual has it for CUDA 13, unverified on a card.
mps::is_protocol_3() {
    [[ " $2 " != *" -p 3 "* ]] || return 0
    grep -qz '^CUDA_MPS_PROTOCOL_VERSION=3' "/proc/$1/environ" 2>/dev/null
}

mps::require_daemons() {
    mps::find_daemons || die "$EXIT_FAILED" "whether MPS daemons run could not be asked: $NOT_TOLD"
}

# mps::count_started_here: how many daemons that enable_mps.sh started for this user still answer, on
# any GPU; more daemons of the user than that means one was started in another way.
mps::count_started_here() {
    local file pipe
    local -i count=0
    for file in "$USER_STATE"/mps-*.state; do
        pipe=$(as_user sed -n 's/^pipe_directory=//p' "$file" 2>/dev/null) || continue
        [[ -z $pipe ]] || ! mps::answers "$pipe" || count+=1
    done
    printf '%d' "$count"
}

# Ends with 6 where any daemon that enable_mps.sh did not start is there.
mps::refuse_other_daemons() {
    local started
    mps::require_daemons
    ((${#MPS_FOREIGN[@]} == 0)) ||
        die "$EXIT_BUSY" "another user's MPS control daemon is running: $(IFS=';' && printf '%s' "${MPS_FOREIGN[*]}");" \
            "two users cannot share a GPU through MPS at the same time, ask its owner to quit it"
    started=$(mps::count_started_here)
    ((${#MPS_OWN[@]} <= started)) ||
        die "$EXIT_BUSY" "an MPS control daemon that enable_mps.sh did not start is running" \
            "($(mig::join "${MPS_OWN[@]}")); end it first: echo quit | nvidia-cuda-mps-control, with its" \
            "CUDA_MPS_PIPE_DIRECTORY"
}
