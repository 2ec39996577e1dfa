#!/bin/bash -p
# Usage: [sudo] ./gpu-configs/disable_mps.sh [options]
#
# Ends the MPS daemon that enable_mps.sh started, checks that nothing answers any more, removes its
# folders and puts the compute mode back (that alone needs root). Waits a while for clients to leave; with
# clients still attached it stops and lists them.
#
#   --gpu INDEX_OR_UUID    which GPU (default: the first)
#   --dry-run              print what would be done, change nothing
#   --help                 this text
#
# Environment: GPU_SHARING_STATE_DIR (where the state file is), GPU_SHARING_WAIT_SECONDS (how long to
# wait for clients and daemon, default 10).
# Exit codes: 0 done, 1 failed or could not be asked, 2 usage, 3 no driver or GPU, 5 no permission,
# 6 clients are attached (listed)

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

print_that_there_is_nothing() {
    local daemon
    mps::require_daemons
    printf 'enable_mps.sh has nothing in force on %s: nothing to undo.\n' "$(gpu::title)"
    for daemon in "${MPS_FOREIGN[@]}" "${MPS_OWN[@]}"; do
        printf '  left alone: MPS control daemon, %s\n' "$daemon"
    done
}

# `quit` under a running client would take its GPU context away.
wait_for_clients() {
    local pid
    local -i tenths
    for ((tenths = 0; ; tenths++)); do
        mps::find_clients "$1" || die "$EXIT_FAILED" "the MPS daemon at $1 could not be asked for its" \
            "clients (it said: $NOT_TOLD); it is left as it is"
        ((${#MPS_CLIENTS[@]} > 0)) || return 0
        if ((DRY_RUN || tenths >= 10 * WAIT_SECONDS)); then break; fi
        sleep 0.1
    done
    for pid in "${MPS_CLIENTS[@]}"; do log "  pid $pid (user $(gpu::owner "$pid")) is attached"; done
    die "$EXIT_BUSY" "the MPS daemon has clients; end them first"
}

# `quit` is answered by nothing reliable: the daemon is gone when the control program finds none.
stop_daemon() {
    local -r pipe=${STATE[pipe_directory]} log_folder=${STATE[log_directory]:-?}
    if mps::answers "$pipe"; then
        wait_for_clients "$pipe"
        mps::tell "$pipe" quit
        ((DRY_RUN)) || mps::wait_for 1 "$pipe" || die "$EXIT_FAILED" "the MPS daemon at $pipe still" \
            "answers $WAIT_SECONDS s after quit; its log is in $log_folder"
    fi
    # only a folder of the form that enable_mps.sh creates
    [[ ${pipe%/*} != */mps.* ]] || run --user rm -rf -- "${pipe%/*}"
}

main() {
    local has_daemon=0
    cli::parse 0 "$@"
    transaction::begin
    gpu::select
    if ! state::load mps && ! state::load compute-mode; then
        print_that_there_is_nothing
        return 0
    fi
    setting::check_saved compute-mode
    if mps::load; then
        has_daemon=1
        stop_daemon
    else
        mps::require_daemons
        ((${#MPS_FOREIGN[@]} == 0)) || die "$EXIT_BUSY" "the compute mode was set for another user's MPS" \
            "control daemon: ${MPS_FOREIGN[*]}; run this as that user"
    fi
    setting::put_back compute-mode
    ((!has_daemon)) || state::remove mps
    ((DRY_RUN)) ||
        printf 'MPS is off on %s, compute mode %s.\n' "$(gpu::title)" "$GPU_COMPUTE_MODE"
}

main "$@"
