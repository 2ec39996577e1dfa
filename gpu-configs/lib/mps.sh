# shellcheck shell=bash
#
# Questions to MPS control daemons. The control program ends with 0 to nearly everything, so it is the
# answer that counts: a daemon is there when it answers, whatever files lie about.

readonly MPS_QUESTION=get_default_active_thread_percentage

# mps::ask PIPE_DIRECTORY COMMAND: prints the daemon's answer.
mps::ask() {
    printf '%s\n' "$2" |
        as_user env CUDA_MPS_PIPE_DIRECTORY="$1" timeout 20 nvidia-cuda-mps-control 2>&1
}

# mps::tell PIPE_DIRECTORY COMMAND: a command that changes something. Its answer and its status say
# nothing reliable; the caller asks afterwards.
mps::tell() {
    local -r where=CUDA_MPS_PIPE_DIRECTORY=$(quoted "$1")
    run --note "echo $2 | $where nvidia-cuda-mps-control" mps::tell_quietly "$@" || true
}

mps::tell_quietly() { mps::ask "$@" >/dev/null; }

# mps::percentage PIPE_DIRECTORY: the default active thread percentage; false where no daemon answers.
mps::percentage() {
    local answer
    answer=$(mps::ask "$1" "$MPS_QUESTION") || return 1
    [[ $answer =~ ^[0-9]+(\.[0-9]+)?$ ]] || return 1
    printf '%s' "$answer"
}

mps::answers() { mps::percentage "$1" >/dev/null; }

# mps::wait_until_answers PIPE_DIRECTORY [SECONDS], mps::wait_until_silent PIPE_DIRECTORY
mps::wait_until_answers() {
    local -i NOW end
    clock::read
    end=$((NOW + ${2:-WAIT_SECONDS}))
    until mps::answers "$1"; do
        ! clock::is_past "$end" || return 1
        sleep 0.1
    done
}

mps::wait_until_silent() {
    local -i NOW end
    clock::read
    end=$((NOW + WAIT_SECONDS))
    while mps::answers "$1"; do
        ! clock::is_past "$end" || return 1
        sleep 0.1
    done
}

# mps::require_access: ends with 5 where the folder of the saved daemon is shut to its own user: the
# daemon may run, and only cannot be asked.
mps::require_access() {
    local folder
    for folder in "${STATE[pipe_directory]%/*}" "${STATE[pipe_directory]}"; do
        ! as_user test -d "$folder" || as_user test -x "$folder" -a -w "$folder" ||
            die "$EXIT_PERMISSION" "$INVOKER_NAME has no permission on the MPS pipe directory: chmod" \
                "u+rwx $(quoted "$folder"), or have its owner give it back"
    done
}

# mps::find_clients PIPE_DIRECTORY: fills MPS_CLIENTS with pids.
mps::find_clients() {
    local server pid
    MPS_CLIENTS=()
    for server in $(mps::numbers "$1" get_server_list); do
        for pid in $(mps::numbers "$1" "get_client_list $server"); do
            MPS_CLIENTS+=("$pid")
        done
    done
}

mps::numbers() {
    local answer
    answer=$(mps::ask "$1" "$2") || return 0
    { grep -Ex '[0-9]+' <<<"$answer" || true; }
}

# mps::quit PIPE_DIRECTORY: asks the daemon to end and waits until it no longer answers.
mps::quit() {
    mps::answers "$1" || return 0
    mps::tell "$1" quit
    ((DRY_RUN)) || mps::wait_until_silent "$1" || {
        warn "the MPS daemon at $1 still answers $WAIT_SECONDS s after quit"
        return 1
    }
}

# Fills MPS_OWN with the pids of the invoking user's control daemons and MPS_FOREIGN with a readable
# line for each one of another user.
mps::find_daemons() {
    local pid user program
    MPS_OWN=()
    MPS_FOREIGN=()
    command -v ps >/dev/null || return 0
    while read -r pid user program _; do
        [[ ${program##*/} == nvidia-cuda-mps-control ]] || continue
        if [[ $user == "$INVOKER_NAME" || $user == "$INVOKER_UID" ]]; then
            MPS_OWN+=("$pid")
        else
            MPS_FOREIGN+=("pid $pid of user $user")
        fi
    done < <(ps -eo pid=,user:32=,args= || true)
}

# mps::count_started_here: how many daemons that enable_mps.sh started for this user still answer, on
# any GPU; more daemons of the user than that means one was started in another way.
mps::count_started_here() {
    local file pipe
    local -i count=0
    for file in "$STATE_DIRECTORY"/mps-*.state; do
        pipe=$(as_user sed -n 's/^pipe_directory=//p' "$file" 2>/dev/null) || continue
        [[ -z $pipe ]] || ! mps::answers "$pipe" || count+=1
    done
    printf '%d' "$count"
}

# Ends with 6 where any daemon that enable_mps.sh did not start is there.
mps::refuse_other_daemons() {
    local started
    mps::find_daemons
    if ((${#MPS_FOREIGN[@]} > 0)); then
        die "$EXIT_BUSY" "another user's MPS control daemon is running: ${MPS_FOREIGN[*]};" \
            "two users cannot share a GPU through MPS at the same time, ask its owner to quit it"
    fi
    started=$(mps::count_started_here)
    if ((${#MPS_OWN[@]} > started)); then
        die "$EXIT_BUSY" "an MPS control daemon that enable_mps.sh did not start is running" \
            "(pid ${MPS_OWN[*]}); end it first: echo quit | nvidia-cuda-mps-control, with its" \
            "CUDA_MPS_PIPE_DIRECTORY"
    fi
}
