#!/bin/bash -p
# Usage: [sudo] ./gpu-configs/disable_mps.sh [options]
#
# Ends the MPS daemon that enable_mps.sh started, checks that nothing answers any more, removes its
# folders and puts the compute mode back (that alone needs root). Waits a while for clients to leave; with
# clients still attached it stops and lists them.

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

has_no_clients() {
    require "the clients of the MPS daemon at $PIPE" mps::find_clients "$PIPE"
    ((${#MPS_CLIENTS[@]} == 0))
}

# `quit` under a running client would take its GPU context away.
wait_for_clients() {
    local pid
    ! wait_until has_no_clients || return 0
    for pid in "${MPS_CLIENTS[@]}"; do log "  pid $pid (user $(process::owner "$pid")) is attached"; done
    die "$EXIT_BUSY" "the MPS daemon has clients; end them first"
}

print_that_there_is_nothing() {
    require "whether MPS daemons run" mps::find_daemons
    printf 'enable_mps.sh has nothing in force on %s: nothing to undo.\n' "$(gpu::title)"
    ((${#MPS_OWN[@]} + ${#MPS_FOREIGN[@]} == 0)) ||
        printf '  left alone: MPS control daemon, %s\n' "${MPS_FOREIGN[@]}" "${MPS_OWN[@]}"
}

# What would keep the compute mode from being put back is looked for first.
stop_daemon() {
    setting::check_saved compute-mode || true
    if mps::load; then
        ! mps::is_up "$PIPE" || wait_for_clients
        mps::stop "$PIPE"
    else
        require "whether MPS daemons run" mps::find_daemons
        ((${#MPS_FOREIGN[@]} == 0)) || die "$EXIT_BUSY" "the compute mode was set for another user's MPS" \
            "control daemon: ${MPS_FOREIGN[*]}; run this as that user"
    fi
}

main() {
    cli::parse 0 "$@"
    transaction::begin
    gpu::select
    if ! state::load mps && ! state::load compute-mode; then
        print_that_there_is_nothing
        return 0
    fi
    stop_daemon
    setting::put_back compute-mode
    [[ -z ${PIPE:-} ]] || state::remove mps
    transaction::end printf 'MPS is off on %s, compute mode %s.\n' "$(gpu::title)" "$GPU_COMPUTE_MODE"
}

main "$@"
