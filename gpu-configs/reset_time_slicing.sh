#!/bin/bash -p
# Usage: ./gpu-configs/reset_time_slicing.sh [options]
#
# Puts the GPU's time slice back to what setup_time_slicing.sh found, and forgets the number of clients.
# Needs root only where the time slice was changed. Does nothing where nothing was set up.

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

main() {
    cli::parse 0 "$@"
    transaction::begin
    gpu::select
    if ! state::load time-slicing && ! state::load time-slice; then
        printf 'Time slicing was not set up on %s: nothing to undo.\n' "$(gpu::title)"
        return 0
    fi
    setting::put_back time-slice
    state::remove time-slicing
    transaction::end printf 'Time slicing is reset on %s.\n' "$(gpu::title)"
}

main "$@"
