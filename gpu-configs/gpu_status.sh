#!/bin/bash -p
# Usage: ./gpu-configs/gpu_status.sh [options]
#
# For each GPU: the sharing mode in force, MIG, the MPS daemon and whose it is, compute mode, time slice,
# the processes on it, what the mode scripts have saved, and the command that would undo it.
#
#   --restore              undo what the mode scripts have saved, as after a script that was killed; ends
#                          with 6 where a run is at work. Without it nothing is changed

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

RESTORE=0
OPTIONS["--restore"]="RESTORE!"
FAILED=0         # whether something could not be asked or undone
UNDO_COMMANDS=() # script and GPU
# Which script undoes which kinds of saved state.
readonly UNDOES=("reset_time_slicing.sh time-slicing time-slice" "disable_mps.sh mps compute-mode"
    "disable_mig.sh mig")

# show LABEL VALUE...: a line each
show() {
    local value
    for value in "${@:2}"; do printf '  %-14s %s\n' "$1:" "$value"; done
}

# told LABEL QUESTION...: whether it was answered; else that is what is shown.
told() {
    ! "${@:2}" || return 0
    FAILED=1
    show "$1" "could not be asked: $NOT_TOLD"
    return 1
}

# saved LABEL QUESTION...: whether it is saved. What is damaged or not to be trusted is shown, and kept in NOT_TOLD:
# the rest does not depend on it.
saved() {
    NOT_TOLD=$("${@:2}" 2>&1) || {
        NOT_TOLD=${NOT_TOLD#error: }
        [[ -z $NOT_TOLD ]] || told "$1" false
        return 1
    }
    "${@:2}"
}

mode_in_force() {
    if [[ $GPU_MIG_CURRENT == Enabled ]]; then
        printf 'mig'
    elif ((!MIG_TOLD)); then
        printf 'not known, since the MIG mode could not be asked'
    elif [[ $DAEMON == up ]]; then
        printf 'mps'
    elif [[ $DAEMON == unknown ]]; then
        printf 'not known, since MPS could not be asked'
    elif ((${#MPS_OWN[@]} + ${#MPS_FOREIGN[@]} > 0)); then
        printf 'mps, by a daemon that enable_mps.sh did not start (for the clients that use it)'
    elif [[ -z $COMPUTE_MODE ]]; then
        printf 'not known, since the compute mode could not be asked'
    elif [[ $COMPUTE_MODE == Default ]]; then
        printf 'time-slicing (what CUDA does by itself)'
    else
        printf 'exclusive (compute mode %s: no sharing)' "$GPU_COMPUTE_MODE"
    fi
}

print_mps() {
    if [[ $DAEMON == up ]]; then
        show "MPS daemon" "of user ${STATE[user]:-?}, answers at $PIPE"
        show "  percentage" "$ACTIVE_THREADS (default active threads of a client)"
        ! told "  clients" mps::find_clients "$PIPE" || show "  clients" "${MPS_CLIENTS[*]:-none}"
    fi
    show "MPS daemon" "${MPS_FOREIGN[@]/#/another, }"
    [[ $DAEMON == gone ]] || return 0
    show "MPS daemon" "${MPS_OWN[@]/%/ of user $INVOKER_NAME, not started by enable_mps.sh for this GPU}"
    ((${#MPS_OWN[@]} + ${#MPS_FOREIGN[@]} > 0)) || show "MPS daemon" none
}

print_saved() {
    local row script kinds kind key found sudo shown=""
    for row in "${UNDOES[@]}"; do
        read -r script kinds <<<"$row"
        found=0
        sudo=""
        for kind in $kinds; do
            saved "saved" state::load "$kind" || {
                shown+=$NOT_TOLD
                continue
            }
            found=1
            show "saved" "$(state::file "$kind")"
            for key in "${!STATE[@]}"; do
                [[ $key == gpu_uuid ]] || printf '    %s=%s\n' "$key" "$(printable "${STATE[$key]}")"
            done | sort
            ! state::is_roots "$kind" || sudo="sudo "
        done
        ((found)) || continue
        shown+=$script
        UNDO_COMMANDS+=("$script $GPU_UUID")
        printf '    undo: %s./gpu-configs/%s --gpu %s\n' "$sudo" "$script" "$GPU_INDEX"
    done
    [[ -n $shown ]] || show "saved" "nothing, so nothing here to undo"
}

print_gpu() {
    DAEMON=gone # the one that enable_mps.sh started
    COMPUTE_MODE=""
    MIG_TOLD=0
    printf '%s\n' "$(gpu::title)"
    if saved "MPS daemon" mps::load; then
        told "MPS daemon" mps::look "$PIPE" || true
    elif [[ -n $NOT_TOLD ]]; then
        DAEMON=unknown
    fi
    ! told "MIG mode" setting::told "$GPU_MIG_CURRENT" || MIG_TOLD=1
    ! told "compute mode" setting::told "$GPU_COMPUTE_MODE" || COMPUTE_MODE=${CURRENT:-Default}
    told "MPS daemons" mps::find_daemons || [[ $DAEMON == up ]] || DAEMON=unknown
    show "mode in force" "$(mode_in_force)"
    show "compute mode" "$GPU_COMPUTE_MODE"
    ! told "time slice" setting::read time-slice || show "time slice" "${CURRENT:-not a setting of this GPU}"
    show "MIG mode" "$GPU_MIG_MODE"
    [[ $GPU_MIG_CURRENT != Enabled ]] || ! told "MIG devices" mig::find_devices ||
        show "MIG device" "${MIG_DEVICES[@]}"
    print_mps
    ! told "in use by" gpu::find_holders || ((${#HOLDERS[@]} > 0)) || HOLDERS=(nobody)
    show "in use by" "${HOLDERS[@]}"
    print_saved
}

# Runs the undo commands; each says itself where it needs root. None of them where a run is at work: it
# undoes its mode itself, and its clients would be cut off. The start time, in the kernel's ticks, tells the
# run's process from a later one with its pid.
restore() {
    local -r folder=${0%"${0##*/}"}
    local command script file started failed=""
    for command in "${UNDO_COMMANDS[@]}"; do
        GPU_UUID=${command#* }
        state::load driver && [[ ${STATE[pid]:-} =~ ^[0-9]+$ ]] || continue
        # behind the program's name, which may hold anything, and the process's state
        started=$(sed -nE 's/.*\) [^Z] //p' "/proc/${STATE[pid]}/stat" 2>/dev/null | cut -d ' ' -f 19) ||
            continue
        [[ $started != "${STATE[started]:-unknown}" ]] ||
            die "$EXIT_BUSY" "a run is at work with ${STATE[mode]:-a mode} on $GPU_UUID: pid ${STATE[pid]}," \
                "into ${STATE[output]:-?}; wait for its end, or stop it: it undoes what it enabled"
    done
    for command in "${UNDO_COMMANDS[@]}"; do
        read -r script GPU_UUID <<<"$command"
        run "${folder:-./}$script" --gpu "$GPU_UUID" || failed+=" $GPU_UUID"
    done
    [[ -z $failed ]] || FAILED=1
    for command in "${UNDO_COMMANDS[@]}"; do
        GPU_UUID=${command#* }
        # by a run's note the next run undoes what could not be undone here
        [[ $failed == *" $GPU_UUID"* ]] || ! state::load driver || state::remove driver
    done
    # What a script was still writing when it was killed; what it would have replaced is undone by now.
    for file in "$ROOT_STATE"/*.state.new; do [[ ! -w $file ]] || run rm -f -- "$file"; done
    for file in "$USER_STATE"/*.state.new; do [[ ! -e $file ]] || run as_user rm -f -- "$file"; done
}

main() {
    local line
    cli::parse 0 "$@"
    transaction::begin
    gpu::list
    for line in "${GPU_LINES[@]}"; do
        gpu::read_line "$line"
        print_gpu
    done
    ((!RESTORE)) || restore
    exit "$FAILED"
}

main "$@"
