#!/bin/bash -p
# Usage: sudo ./gpu-configs/disable_mig.sh [options]
#
# Destroys the MIG instances that setup_mig.sh created and puts MIG mode back to what it was.

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

check_preconditions() {
    local others
    [[ ${STATE[previous_mig_mode]:-} =~ ^(Enabled|Disabled)$ &&
        ${STATE[gpu_instances]:-}${STATE[instances_before]:-} =~ ^[0-9,]*$ ]] ||
        state::damaged mig "no mode, or ids that are none"
    card::require "changing MIG"
    mig::find_own
    require "who uses the GPU instances of $(gpu::title)" mig::find_holders "$OURS"
    ! gpu::print_holders || die "$EXIT_BUSY" "the instances are in use by the processes above; end them first"
    others=$(mig::subtract "$IDS" "$OURS")
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
        [[ $GPU_MIG_CURRENT != Enabled ]] || printf '  MIG mode was not switched on here; it is left alone.\n'
        return 0
    fi
    check_preconditions
    mig::destroy "$OURS"
    [[ ${STATE[previous_mig_mode]} == Enabled ]] || setting::change MIG-mode Disabled
    state::remove mig
    transaction::end printf 'MIG mode is %s on %s, as before.\n' "$GPU_MIG_CURRENT" "$(gpu::title)"
}

main "$@"
