#!/usr/bin/env bash
#
# Says what is in force on each GPU and what would undo it; with --restore it is undone.

# shellcheck source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=lib/gpu.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/gpu.sh"
# shellcheck source=lib/mps.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/mps.sh"
# shellcheck source=lib/mig.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/mig.sh"

RESTORE=0
UNDO_COMMANDS=() # script and GPU

usage() {
    cat <<'TEXT'
Usage: ./gpu-configs/gpu_status.sh [options]

For each GPU: the sharing mode in force, MIG, the MPS daemon and whose it is, compute mode, time slice,
the processes on it, what the mode scripts have saved, and the command that would undo it.

  --gpu INDEX_OR_UUID    only this GPU
  --restore              undo what the mode scripts have saved, as after a script that was killed;
                         without it nothing is changed
  --dry-run              with --restore: print the commands
  --help                 this text

Exit codes: 0 said, 1 something could not be undone, 2 usage, 3 no driver or GPU, 6 a run is at work with
the mode
TEXT
}

# Sets OUR_DAEMON to the pipe directory of the daemon that enable_mps.sh started, if it answers.
find_our_daemon() {
    OUR_DAEMON=""
    if state::load mps && mps::answers "${STATE[pipe_directory]}"; then
        OUR_DAEMON=${STATE[pipe_directory]}
    fi
}

mode_in_force() {
    if [[ $GPU_MIG_CURRENT == Enabled ]]; then
        printf 'mig'
    elif [[ -n $OUR_DAEMON ]]; then
        printf 'mps'
    elif ((${#MPS_OWN[@]} + ${#MPS_FOREIGN[@]} > 0)); then
        printf 'mps, by a daemon that enable_mps.sh did not start (for the clients that use it)'
    elif [[ $GPU_COMPUTE_MODE == Default ]]; then
        printf 'time-slicing (what CUDA does by itself)'
    else
        printf 'exclusive (compute mode %s: no sharing)' "$GPU_COMPUTE_MODE"
    fi
}

print_mig() {
    local uuid profile
    printf '  MIG mode:      %s' "$GPU_MIG_CURRENT"
    [[ $GPU_MIG_CURRENT == "$GPU_MIG_PENDING" ]] ||
        printf ' (pending: %s, after a reset of the GPU)' "$GPU_MIG_PENDING"
    printf '\n'
    mig::devices | while read -r uuid profile; do printf '    %-12s %s\n' "$profile" "$uuid"; done
}

print_mps() {
    local daemon
    if [[ -n $OUR_DAEMON ]]; then
        mps::find_clients "$OUR_DAEMON"
        printf '  MPS daemon:    of user %s, answers at %s\n' "${STATE[user]}" "$OUR_DAEMON"
        printf '    default active thread percentage %s, clients: %s\n' \
            "$(mps::percentage "$OUR_DAEMON" || printf '?')" "${MPS_CLIENTS[*]:-none}"
    elif ((${#MPS_OWN[@]} + ${#MPS_FOREIGN[@]} == 0)); then
        printf '  MPS daemon:    none\n'
    fi
    for daemon in "${MPS_FOREIGN[@]}"; do printf '  MPS daemon:    another, %s\n' "$daemon"; done
    [[ -n $OUR_DAEMON ]] || ((${#MPS_OWN[@]} == 0)) ||
        printf '  MPS daemon:    of user %s, pid %s, not started by enable_mps.sh for this GPU\n' \
            "$INVOKER_NAME" "${MPS_OWN[*]}"
}

print_processes() {
    gpu::find_holders
    if ((${#HOLDERS[@]} == 0)); then
        printf '  in use by:     nobody\n'
    else
        printf '  in use by:\n'
        printf '    %s\n' "${HOLDERS[@]}"
    fi
}

print_saved() {
    local mode key undo
    local -rA undo_commands=([time-slicing]=reset_time_slicing.sh
        [mps]=disable_mps.sh [mig]=disable_mig.sh)
    local any=0
    for mode in time-slicing mps mig; do
        state::load "$mode" || continue
        any=1
        printf '  saved:         %s\n' "$(state::file "$mode")"
        for key in "${!STATE[@]}"; do
            [[ $key == gpu_uuid ]] || printf '    %s=%s\n' "$key" "${STATE[$key]}"
        done | sort
        UNDO_COMMANDS+=("${undo_commands[$mode]} $GPU_UUID")
        undo="./gpu-configs/${undo_commands[$mode]} --gpu $GPU_INDEX"
        ! state::needs_root "$mode" || undo="sudo $undo"
        printf '    undo: %s\n' "$undo"
    done
    ((any)) || printf '  saved:         nothing, so nothing here to undo\n'
}

print_gpu() {
    find_our_daemon
    printf '%s\n' "$(gpu::title)"
    printf '  mode in force: %s\n' "$(mode_in_force)"
    printf '  compute mode:  %s\n' "$GPU_COMPUTE_MODE"
    printf '  time slice:    %s\n' "$(gpu::timeslice | grep . || printf 'not a setting of this GPU')"
    print_mig
    print_mps
    print_processes
    print_saved
}

print_gpus() {
    local line
    mps::find_daemons
    if [[ -n $GPU_SELECTOR ]]; then
        gpu::select
        print_gpu
        return 0
    fi
    gpu::list
    for line in "${GPU_LINES[@]}"; do
        gpu::read_line "$line"
        print_gpu
    done
}

# Runs the undo commands; each says itself where it needs root. None of them where a run is at work: it
# undoes its mode itself, and its clients would be cut off.
restore() {
    local command script uuid
    local -i failed=0
    for command in "${UNDO_COMMANDS[@]}"; do
        read -r _ GPU_UUID <<<"$command"
        ! state::driver_at_work ||
            die "$EXIT_BUSY" "a run is at work with ${STATE[mode]:-a mode} on $GPU_UUID: pid" \
                "${STATE[pid]}, into ${STATE[output]:-?}; wait for its end, or stop it: it undoes" \
                "what it enabled"
    done
    for command in "${UNDO_COMMANDS[@]}"; do
        read -r script uuid <<<"$command"
        run "$(dirname -- "${BASH_SOURCE[0]}")/$script" --gpu "$uuid" || failed=1
        GPU_UUID=$uuid
        ((failed)) || ! state::load driver || state::remove driver
    done
    exit "$failed"
}

parse_arguments() {
    local word
    local -a others=()
    for word in "$@"; do
        if [[ $word == --restore ]]; then RESTORE=1; else others+=("$word"); fi
    done
    cli::parse_common "${others[@]}"
}

main() {
    parse_arguments "$@"
    transaction::begin
    user::resolve
    print_gpus
    ((!RESTORE)) || restore
}

main "$@"
