#!/usr/bin/env bash
#
# Undoes setup_time_slicing.sh: the length of a slice that was there before, and the record.

# shellcheck source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=lib/gpu.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/gpu.sh"

usage() {
    cat <<'TEXT'
Usage: ./gpu-configs/reset_time_slicing.sh [options]

Puts the GPU's time slice back to what setup_time_slicing.sh found, and forgets the number of clients.
Needs root only where the time slice was changed. Does nothing where nothing was set up.

  --gpu INDEX_OR_UUID    which GPU (default: the first)
  --dry-run              print what would be done, change nothing
  --help                 this text

Exit codes: 0 done, 2 usage, 3 no driver or GPU, 5 no permission
TEXT
}

put_back() {
    local -r current=$(gpu::timeslice) previous=${STATE[previous_timeslice]:-}
    if [[ -z $previous || $current == "$previous" ]]; then
        log "The time slice is ${current:-no setting of this GPU}: nothing to put back."
    elif [[ $current != "${STATE[timeslice]:-}" ]]; then
        # a driver reload resets it, or somebody else has set it since: not ours to undo
        warn "the time slice is $current, not the ${STATE[timeslice]:-?} that was set up; left as it is"
    elif [[ ! $previous =~ ^(Default|Short|Medium|Long)$ ]]; then
        die "$EXIT_FAILED" "$(state::file time-slicing) is damaged (previous_timeslice=$previous)"
    else
        card::require "changing the time slice"
        gpu::change_timeslice "$previous"
        ((DRY_RUN)) || [[ $(gpu::timeslice) == "$previous" ]] ||
            card::failed "the time slice is $(gpu::timeslice), not $previous"
    fi
    state::remove time-slicing
}

main() {
    cli::parse_common "$@"
    transaction::begin
    user::resolve
    gpu::select
    if ! state::load time-slicing; then
        printf 'Time slicing was not set up on %s: nothing to undo.\n' "$(gpu::title)"
        return 0
    fi
    put_back
    ((DRY_RUN)) || printf 'Time slicing is reset on %s.\n' "$(gpu::title)"
}

main "$@"
