#!/usr/bin/env bash
#
# Undoes enable_mps.sh: ends the daemon that it started, removes that daemon's folders, puts the compute
# mode back. A daemon of another user, or one started by hand, is left alone.

# shellcheck source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=lib/gpu.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/gpu.sh"
# shellcheck source=lib/mps.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/mps.sh"

usage() {
    cat <<'TEXT'
Usage: [sudo] ./gpu-configs/disable_mps.sh [options]

Ends the MPS daemon that enable_mps.sh started, checks that nothing answers any more, removes its
folders and puts the compute mode back (that alone needs root). Waits a while for clients to leave; with
clients still attached it stops and lists them.

  --gpu INDEX_OR_UUID    which GPU (default: the first)
  --dry-run              print what would be done, change nothing
  --help                 this text

Environment: GPU_SHARING_STATE_DIR (where the state file is), GPU_SHARING_WAIT_SECONDS (how long to
wait for clients and daemon, default 10).
Exit codes: 0 done, 2 usage, 3 no driver or GPU, 5 no permission, 6 clients are attached (listed)
TEXT
}

say_that_there_is_nothing() {
    printf 'enable_mps.sh has nothing in force on %s: nothing to undo.\n' "$(gpu::title)"
    mps::find_daemons
    local daemon
    for daemon in "${MPS_FOREIGN[@]}" "${MPS_OWN[@]/#/pid }"; do
        printf '  left alone: MPS control daemon, %s\n' "$daemon"
    done
}

check_preconditions() {
    [[ ${STATE[uid]:-} == "$INVOKER_UID" ]] || die "$EXIT_PERMISSION" \
        "the MPS daemon was started by user ${STATE[user]:-?}; run this as that user"
    [[ ${STATE[previous_compute_mode]:-} =~ ^(Default|Prohibited|Exclusive_(Process|Thread))$ ]] ||
        die "$EXIT_FAILED" "$(state::file mps) is damaged (previous_compute_mode)"
    mps::require_access
    ! mode_is_ours || card::require "putting the compute mode back"
    wait_for_clients
}

mode_is_ours() {
    [[ ${STATE[compute_mode]:-} != "${STATE[previous_compute_mode]}" &&
        $GPU_COMPUTE_MODE == "${STATE[compute_mode]:-}" ]]
}

# `quit` under a running client would take its GPU context away.
wait_for_clients() {
    local -i NOW end
    local pid
    clock::read
    end=$((NOW + WAIT_SECONDS))
    mps::answers "${STATE[pipe_directory]}" || return 0
    while mps::find_clients "${STATE[pipe_directory]}" && ((${#MPS_CLIENTS[@]} > 0)); do
        if ((DRY_RUN)) || clock::is_past "$end"; then
            for pid in "${MPS_CLIENTS[@]}"; do
                log "  pid $pid (user $(gpu::owner "$pid")) is attached"
            done
            die "$EXIT_BUSY" "the MPS daemon has clients; end them first"
        fi
        sleep 0.5
    done
}

stop_daemon() {
    local -r folder=$(dirname -- "${STATE[pipe_directory]}")
    mps::quit "${STATE[pipe_directory]}" ||
        die "$EXIT_FAILED" "the MPS daemon cannot be ended; its log is in ${STATE[log_directory]:-?}"
    # only a folder of the form that enable_mps.sh creates
    [[ ${folder##*/} != mps.* ]] || run --user rm -rf -- "$folder"
}

put_back_compute_mode() {
    if mode_is_ours; then
        gpu::change_compute_mode "${STATE[previous_compute_mode]}"
        ((DRY_RUN)) && return 0
        gpu::refresh
        [[ $GPU_COMPUTE_MODE == "${STATE[previous_compute_mode]}" ]] ||
            card::failed "the compute mode is $GPU_COMPUTE_MODE, not ${STATE[previous_compute_mode]}"
    fi
}

main() {
    cli::parse_common "$@"
    transaction::begin
    user::resolve
    gpu::select
    if ! state::load mps; then
        say_that_there_is_nothing
        return 0
    fi
    check_preconditions
    stop_daemon
    put_back_compute_mode
    state::remove mps
    ((DRY_RUN)) ||
        printf 'MPS is off on %s, compute mode %s.\n' "$(gpu::title)" "$GPU_COMPUTE_MODE"
}

main "$@"
