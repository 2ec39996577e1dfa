#!/bin/bash -p
# Usage: [sudo] ./gpu-configs/disable_mps.sh [options]
#
# Ends the MPS daemon that enable_mps.sh started and puts the compute mode back (that alone needs root).
# Waits a while for clients to leave; with clients still attached it stops and lists them.

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

# Ends the script but where the compute mode alone is to be put back, and nobody's daemon needs it.
leave_daemons() {
    require "whether MPS daemons run" mps::find_daemons
    if state::load compute-mode; then
        ((${#MPS_FOREIGN[@]} == 0)) || die "$EXIT_BUSY" "the compute mode was set for another user's MPS" \
            "control daemon: ${MPS_FOREIGN[*]}; run this as that user"
        return 0
    fi
    printf 'enable_mps.sh has nothing in force on %s: nothing to undo.\n' "$(gpu::title)"
    ((${#MPS_OWN[@]} + ${#MPS_FOREIGN[@]} == 0)) ||
        printf '  left alone: MPS control daemon, %s\n' "${MPS_FOREIGN[@]}" "${MPS_OWN[@]}"
    exit 0
}

main() {
    cli::parse 0 "$@"
    transaction::begin
    gpu::select
    setting::check_saved compute-mode || true # what would keep it from being put back comes first
    if mps::load; then
        ! mps::is_up "$PIPE" || wait_for_clients
        mps::stop "$PIPE"
        state::remove mps
    else
        leave_daemons
    fi
    setting::put_back compute-mode
    transaction::end printf 'MPS is off on %s, compute mode %s.\n' "$(gpu::title)" "$GPU_COMPUTE_MODE"
}

main "$@"
