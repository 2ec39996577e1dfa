#!/bin/bash -p
# Usage: ./gpu-configs/setup_time_slicing.sh CLIENTS [options]
#
# Prepares one GPU for time slicing among CLIENTS processes, and says what is in force.
#
#   CLIENTS                how many clients may share the GPU (1 to 9999)
#   --timeslice LENGTH     default, short, medium or long; needs root. Without it the GPU keeps the
#                          length it has, and the script needs no root
#   --gpu INDEX_OR_UUID    which GPU (default: the first)
#   --dry-run              print what would be done, change nothing
#   --help                 this text
#
# Exit codes: 0 in force, 1 failed or could not be asked, 2 usage, 3 no driver or GPU, 4 not supported by
# this GPU, 5 no permission, 6 something else holds the GPU (named). Undo: ./gpu-configs/reset_time_slicing.sh

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

TIMESLICE=""
OPTIONS["--timeslice"]=TIMESLICE

parse_arguments() {
    cli::parse 1 "$@"
    CLIENTS=${POSITIONAL[0]:-}
    [[ $CLIENTS =~ ^[1-9][0-9]{0,3}$ ]] ||
        cli::usage_error "CLIENTS must be a number from 1 to 9999, not '$CLIENTS'"
    case ${TIMESLICE,,} in
        "" | default | short | medium | long) TIMESLICE=${TIMESLICE,,} && TIMESLICE=${TIMESLICE^} ;;
        *) cli::usage_error "--timeslice is default, short, medium or long, not '$TIMESLICE'" ;;
    esac
}

check_preconditions() {
    local holder pid
    if [[ $GPU_MIG_CURRENT == Enabled ]]; then
        die "$EXIT_BUSY" "MIG mode is on, $(gpu::title) cannot be shared as a whole;" \
            "switch it off: sudo ./gpu-configs/disable_mig.sh"
    fi
    [[ $GPU_MIG_PENDING != Enabled ]] ||
        warn "MIG mode is pending: the GPU will be in MIG mode after its next reset"
    mps::refuse_own
    mps::require_daemons
    ((${#MPS_OWN[@]} == 0)) || mps::refuse_other_daemons
    gpu::find_holders ||
        die "$EXIT_FAILED" "whether an MPS server holds $(gpu::title) could not be asked: $NOT_TOLD"
    for holder in "${HOLDERS[@]}"; do
        read -r _ pid _ <<<"$holder"
        [[ $holder != *nvidia-cuda-mps-server* ]] || ! process::runs "$pid" nvidia-cuda-mps-server ||
            die "$EXIT_BUSY" "an MPS server holds $(gpu::title): $holder"
    done
    ((${#MPS_FOREIGN[@]} == 0)) ||
        warn "another user's MPS control daemon is running: ${MPS_FOREIGN[*]}"
    [[ $GPU_COMPUTE_MODE == Default ]] ||
        die "$EXIT_BUSY" "compute mode is $GPU_COMPUTE_MODE, so clients cannot share;" \
            "if nobody needs it so: sudo nvidia-smi -i $GPU_INDEX -c DEFAULT"
    gpu::print_holders
}

check_timeslice() {
    [[ -n $TIMESLICE ]] || return 0
    setting::require_read time-slice
    [[ -n $CURRENT ]] ||
        die "$EXIT_UNSUPPORTED" "$(gpu::title) has no time slice setting; leave --timeslice out"
    [[ $TIMESLICE == "$CURRENT" ]] || card::require "changing the time slice"
}

apply() {
    state::keep time-slicing
    state::save time-slicing "clients=$CLIENTS"
    [[ -z $TIMESLICE ]] || setting::set time-slice "$TIMESLICE"
    undo::forget
}

print_in_force() {
    setting::read time-slice || CURRENT="could not be asked: $NOT_TOLD"
    cat <<TEXT
Time slicing is in force on $(gpu::title)
  clients:       $CLIENTS
  time slice:    ${CURRENT:-not a setting of this GPU}
  compute mode:  Default, MPS off, MIG ${GPU_MIG_CURRENT/Disabled/off}
  undo:          ./gpu-configs/reset_time_slicing.sh
TEXT
}

main() {
    parse_arguments "$@"
    transaction::begin
    gpu::select
    check_preconditions
    check_timeslice
    apply
    unless_dry print_in_force
}

main "$@"
