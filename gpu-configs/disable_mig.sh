#!/usr/bin/env bash
#
# Undoes setup_mig.sh: destroys the instances that it created, and switches MIG mode off if it had
# switched it on. Instances of others, and MIG mode that was on before, are left alone.

# shellcheck source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=lib/gpu.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/gpu.sh"
# shellcheck source=lib/mig.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/mig.sh"

usage() {
    cat <<'TEXT'
Usage: sudo ./gpu-configs/disable_mig.sh [options]

Destroys the MIG instances that setup_mig.sh created and puts MIG mode back to what it was.

  --gpu INDEX_OR_UUID    which GPU (default: the first)
  --dry-run              print what would be done, change nothing
  --help                 this text

Exit codes: 0 done, 2 usage, 3 no driver or GPU, 5 no permission, 6 in use (the processes are listed)
TEXT
}

say_that_there_is_nothing() {
    printf 'setup_mig.sh has nothing in force on %s: nothing to undo.\n' "$(gpu::title)"
    [[ $GPU_MIG_CURRENT != Enabled ]] ||
        printf '  MIG mode is on, but was not switched on here; it is left alone.\n'
}

# Sets OURS (ids that are still there) and SWITCH_OFF.
read_own_state() {
    [[ ${STATE[previous_mig_mode]:-} =~ ^(Enabled|Disabled)$ &&
        ${STATE[gpu_instances]:-} =~ ^[0-9,]*$ && ${STATE[instances_before]:-} =~ ^[0-9,]*$ ]] ||
        die "$EXIT_FAILED" "$(state::file mig) is damaged"
    INSTANCES=()
    [[ $GPU_MIG_CURRENT != Enabled ]] || mig::read_instances
    OURS=$(mig::own_instances)
    SWITCH_OFF=0
    if [[ ${STATE[previous_mig_mode]} == Disabled ]] &&
        [[ $GPU_MIG_CURRENT != Disabled || $GPU_MIG_PENDING != Disabled ]]; then
        SWITCH_OFF=1
    fi
}

check_preconditions() {
    local holders others
    holders=$(mig::holders "$OURS")
    if [[ -n $OURS && -n $holders ]]; then
        log "$holders"
        die "$EXIT_BUSY" "the instances are in use by the processes above; end them first"
    fi
    others=$(mig::subtract "$(mig::instance_ids)" "$OURS")
    if ((SWITCH_OFF)) && [[ -n $others ]]; then
        die "$EXIT_BUSY" "GPU instances that setup_mig.sh did not create are there (ids $others);" \
            "MIG mode cannot be switched off under them"
    fi
    if ((SWITCH_OFF)) || [[ -n $OURS ]]; then
        card::require "changing MIG"
    fi
}

apply() {
    mig::destroy "$OURS"
    ((!SWITCH_OFF)) || mig::put_back_mode Disabled
    state::remove mig
}

main() {
    cli::parse_common "$@"
    transaction::begin
    user::resolve
    gpu::select
    if ! state::load mig; then
        say_that_there_is_nothing
        return 0
    fi
    read_own_state
    check_preconditions
    apply
    ((DRY_RUN)) || printf 'MIG mode is %s on %s, as before.\n' "$GPU_MIG_CURRENT" "$(gpu::title)"
}

main "$@"
