#!/bin/bash -p
# Usage: sudo ./gpu-configs/disable_mig.sh [options]
#
# Destroys the MIG instances that setup_mig.sh created and puts MIG mode back to what it was.
#
#   --gpu INDEX_OR_UUID    which GPU (default: the first)
#   --dry-run              print what would be done, change nothing
#   --help                 this text
#
# Exit codes: 0 done, 1 failed or could not be asked, 2 usage, 3 no driver or GPU, 5 no permission,
# 6 in use (the processes are listed)

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

# Sets OURS, the ids that are still there.
read_own_state() {
    [[ ${STATE[previous_mig_mode]:-} =~ ^(Enabled|Disabled)$ &&
        ${STATE[gpu_instances]:-} =~ ^[0-9,]*$ && ${STATE[instances_before]:-} =~ ^[0-9,]*$ ]] ||
        die "$EXIT_FAILED" "$(state::file mig) is damaged"
    card::require "changing MIG"
    mig::read_instances
    OURS=$(mig::own_instances)
}

check_preconditions() {
    local others
    mig::refuse_holders "$OURS"
    others=$(mig::subtract "$(mig::instance_ids)" "$OURS")
    [[ ${STATE[previous_mig_mode]} == Enabled || -z $others ]] ||
        die "$EXIT_BUSY" "GPU instances that setup_mig.sh did not create are there (ids $others);" \
            "MIG mode cannot be switched off under them"
}

main() {
    cli::parse 0 "$@"
    transaction::begin
    gpu::select
    if ! state::load mig; then
        printf 'setup_mig.sh has nothing in force on %s: nothing to undo.\n' "$(gpu::title)"
        [[ $GPU_MIG_CURRENT != Enabled ]] ||
            printf '  MIG mode is on, but was not switched on here; it is left alone.\n'
        return 0
    fi
    read_own_state
    check_preconditions
    mig::destroy "$OURS"
    [[ ${STATE[previous_mig_mode]} == Enabled ]] || mig::put_back_mode Disabled
    state::remove mig
    ((DRY_RUN)) || printf 'MIG mode is %s on %s, as before.\n' "$GPU_MIG_CURRENT" "$(gpu::title)"
}

main "$@"
