#!/bin/bash -p
# Usage: ./gpu-configs/gpu_status.sh [options]
#
# For each GPU: the sharing mode in force, MIG, the MPS daemon and whose it is, compute mode, time slice,
# the processes on it, what the mode scripts have saved, and the command that would undo it.
#
#   --gpu INDEX_OR_UUID    only this GPU
#   --restore              undo what the mode scripts have saved, as after a script that was killed;
#                          without it nothing is changed
#   --dry-run              with --restore: print the commands
#   --help                 this text
#
# Exit codes: 0 said, 1 something could not be asked or undone, 2 usage, 3 no driver or GPU, 6 a run is at
# work with the mode

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

RESTORE=0
OPTIONS["--restore"]="RESTORE!"
FAILED=0         # whether something could not be asked or undone
UNDO_COMMANDS=() # script and GPU

# told QUESTION...: whether it was answered; else that is what is printed.
told() {
    ! "$@" || return 0
    FAILED=1
    printf 'could not be asked: %s\n' "$NOT_TOLD"
    return 1
}

# Sets DAEMON, whether the daemon that enable_mps.sh started answers: yes, no or unknown.
find_our_daemon() {
    local status=0
    DAEMON=no
    mps::load || return 0
    mps::probe "${STATE[pipe_directory]}" || status=$?
    case $status in
        0) DAEMON=yes ;;
        2)
            DAEMON=unknown
            NOT_TOLD=$MPS_ANSWER
            return 1
            ;;
    esac
}

mode_in_force() {
    if [[ $GPU_MIG_CURRENT == Enabled ]]; then
        printf 'mig'
    elif [[ $DAEMON == yes ]]; then
        printf 'mps'
    elif [[ $DAEMON == unknown ]] || ((!DAEMONS_TOLD)); then
        printf 'not known, since MPS could not be asked'
    elif ((${#MPS_OWN[@]} + ${#MPS_FOREIGN[@]} > 0)); then
        printf 'mps, by a daemon that enable_mps.sh did not start (for the clients that use it)'
    elif [[ $GPU_COMPUTE_MODE == Default ]]; then
        printf 'time-slicing (what CUDA does by itself)'
    else
        printf 'exclusive (compute mode %s: no sharing)' "$GPU_COMPUTE_MODE"
    fi
}

print_mig() {
    printf '  MIG mode:      %s' "$GPU_MIG_CURRENT"
    [[ $GPU_MIG_CURRENT == "$GPU_MIG_PENDING" ]] ||
        printf ' (pending: %s, after a reset of the GPU)' "$GPU_MIG_PENDING"
    printf '\n'
    [[ $GPU_MIG_CURRENT != Enabled ]] || ! told mig::find_devices || mig::print_devices "    "
}

print_mps() {
    local line
    if [[ $DAEMON == yes ]]; then
        printf '  MPS daemon:    of user %s, answers at %s\n' "${STATE[user]:-?}" "${STATE[pipe_directory]}"
        printf '    default active thread percentage %s, clients: ' "$MPS_ANSWER"
        ! told mps::find_clients "${STATE[pipe_directory]}" || printf '%s\n' "${MPS_CLIENTS[*]:-none}"
    elif [[ $DAEMON == unknown ]]; then
        printf '  MPS daemon:    at %s ' "${STATE[pipe_directory]}"
        told find_our_daemon || true
    fi
    for line in "${MPS_FOREIGN[@]}"; do printf '  MPS daemon:    another, %s\n' "$line"; done
    if ((!DAEMONS_TOLD)); then
        printf '  MPS daemon:    others '
        told mps::find_daemons || true
    elif [[ $DAEMON == no ]] && ((${#MPS_OWN[@]} > 0)); then
        printf '  MPS daemon:    of user %s, %s, not started by enable_mps.sh for this GPU\n' \
            "$INVOKER_NAME" "${MPS_OWN[*]}"
    elif [[ $DAEMON == no ]] && ((${#MPS_FOREIGN[@]} == 0)); then
        printf '  MPS daemon:    none\n'
    fi
}

print_saved() {
    local mode kind key undo any=0
    for mode in time-slicing mps mig; do
        undo=""
        for kind in ${STATE_KINDS[$mode]}; do
            state::load "$kind" || continue
            undo="./gpu-configs/${UNDO_SCRIPTS[$mode]} --gpu $GPU_INDEX"
            printf '  saved:         %s\n' "$(state::file "$kind")"
            for key in "${!STATE[@]}"; do
                [[ $key == gpu_uuid ]] || printf '    %s=%s\n' "$key" "$(printable "${STATE[$key]}")"
            done | sort
        done
        [[ -n $undo ]] || continue
        any=1
        UNDO_COMMANDS+=("${UNDO_SCRIPTS[$mode]} $GPU_UUID")
        ! state::needs_root "$mode" || undo="sudo $undo"
        printf '    undo: %s\n' "$undo"
    done
    ((any)) || printf '  saved:         nothing, so nothing here to undo\n'
}

print_gpu() {
    find_our_daemon || true
    printf '%s\n' "$(gpu::title)"
    printf '  mode in force: %s\n' "$(mode_in_force)"
    printf '  compute mode:  %s\n' "$GPU_COMPUTE_MODE"
    printf '  time slice:    '
    ! told setting::read time-slice || printf '%s\n' "${CURRENT:-not a setting of this GPU}"
    print_mig
    print_mps
    printf '  in use by:     '
    ! told gpu::find_holders || { ((${#HOLDERS[@]})) && printf '\n' || printf 'nobody\n'; }
    ((${#HOLDERS[@]} == 0)) || printf '    %s\n' "${HOLDERS[@]}"
    print_saved
}

# Runs the undo commands; each says itself where it needs root. None of them where a run is at work: it
# undoes its mode itself, and its clients would be cut off.
restore() {
    local command script
    for command in "${UNDO_COMMANDS[@]}"; do
        read -r _ GPU_UUID <<<"$command"
        ! state::driver_at_work ||
            die "$EXIT_BUSY" "a run is at work with ${STATE[mode]:-a mode} on $GPU_UUID: pid" \
                "${STATE[pid]}, into ${STATE[output]:-?}; wait for its end, or stop it: it undoes" \
                "what it enabled"
    done
    for command in "${UNDO_COMMANDS[@]}"; do
        read -r script GPU_UUID <<<"$command"
        if run "${0%"${0##*/}"}$script" --gpu "$GPU_UUID"; then
            ! state::load driver || state::remove driver
        else
            FAILED=1
        fi
    done
    remove_unfinished
}

# What a script was still writing when it was killed; what it would have replaced is undone by then.
remove_unfinished() {
    local -a files=("$USER_STATE"/*.state.new)
    [[ ! -e ${files[0]} ]] || run --user rm -f -- "${files[@]}"
    files=("$ROOT_STATE"/*.state.new)
    [[ ! -e ${files[0]} || ! -w $ROOT_STATE ]] || run rm -f -- "${files[@]}"
}

main() {
    local line
    cli::parse 0 "$@"
    transaction::begin
    mps::find_daemons && DAEMONS_TOLD=1 || DAEMONS_TOLD=0
    if [[ -n $GPU_SELECTOR ]]; then
        gpu::select
        print_gpu
    else
        gpu::list
        for line in "${GPU_LINES[@]}"; do
            gpu::read_line "$line"
            print_gpu
        done
    fi
    ((!RESTORE)) || restore
    exit "$FAILED"
}

main "$@"
