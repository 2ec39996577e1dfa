#!/bin/bash -p
# Usage: [sudo] ./gpu-configs/disable_mps.sh [options]
#
# Ends the MPS daemon that enable_mps.sh started, checks that nothing answers any more, removes its
# folders and puts the compute mode back (that alone needs root). Waits a while for clients to leave; with
# clients still attached it stops and lists them.
#

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

print_that_there_is_nothing() {
    local daemon
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
        require "the clients of the MPS daemon at $PIPE" mps::find_clients "$PIPE"
        ((${#MPS_CLIENTS[@]} > 0)) || return 0
        if ((DRY_RUN || tenths >= 10 * WAIT_SECONDS)); then break; fi
        sleep 0.1
    done
    for pid in "${MPS_CLIENTS[@]}"; do log "  pid $pid (user $(process::owner "$pid")) is attached"; done
    die "$EXIT_BUSY" "the MPS daemon has clients; end them first"
}

main() {
    local has_mode=0
    cli::parse 0 "$@"
    transaction::begin
    gpu::select
    ! setting::check_saved compute-mode || has_mode=1
    if mps::load; then
        ! mps::is_up "$PIPE" || wait_for_clients
        mps::stop "$PIPE"
    else
        require "whether MPS daemons run" mps::find_daemons
        if ((!has_mode)); then
            print_that_there_is_nothing
            return 0
        fi
        ((${#MPS_FOREIGN[@]} == 0)) || die "$EXIT_BUSY" "the compute mode was set for another user's MPS" \
            "control daemon: ${MPS_FOREIGN[*]}; run this as that user"
    fi
    setting::put_back compute-mode
    [[ -z ${PIPE:-} ]] || state::remove mps
    ((DRY_RUN)) ||
        printf 'MPS is off on %s, compute mode %s.\n' "$(gpu::title)" "$GPU_COMPUTE_MODE"
}

main "$@"
