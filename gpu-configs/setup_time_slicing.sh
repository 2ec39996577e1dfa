#!/bin/bash -p
# Usage: ./gpu-configs/setup_time_slicing.sh CLIENTS [options]
#
# Prepares one GPU for time slicing among CLIENTS processes (1 to 9999), and says what is in force.
# Undo: ./gpu-configs/reset_time_slicing.sh
#
#   --timeslice LENGTH     default, short, medium or long; needs root. Without it the length stays

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

TIMESLICE=""
OPTIONS["--timeslice"]=TIMESLICE

parse_arguments() {
    cli::parse 1 "$@"
    CLIENTS=${POSITIONAL[0]:-}
    [[ $CLIENTS =~ ^[1-9][0-9]{0,3}$ ]] ||
        cli::usage_error "CLIENTS must be a number from 1 to 9999, not '$CLIENTS'"
    [[ ${TIMESLICE,,} =~ ^(|default|short|medium|long)$ ]] ||
        cli::usage_error "--timeslice is default, short, medium or long, not '$TIMESLICE'"
    TIMESLICE=${TIMESLICE,,}
    TIMESLICE=${TIMESLICE^}
}

check_preconditions() {
    local holder pid
    mig::refuse_on
    mps::refuse_own
    mps::refuse_started_by_hand
    require "whether an MPS server holds $(gpu::title)" gpu::find_holders
    for holder in "${HOLDERS[@]}"; do
        read -r _ pid _ <<<"$holder"
        [[ $holder != *nvidia-cuda-mps-server* ]] || ! process::runs "$pid" nvidia-cuda-mps-server ||
            die "$EXIT_BUSY" "an MPS server holds $(gpu::title): $holder"
    done
    ((${#MPS_FOREIGN[@]} == 0)) || warn "another user's MPS control daemon is running: ${MPS_FOREIGN[*]}"
    require "the compute mode" setting::read compute-mode
    [[ ${CURRENT:-Default} == Default ]] ||
        die "$EXIT_BUSY" "compute mode is $GPU_COMPUTE_MODE, so clients cannot share; if nobody needs it so:" \
            "sudo nvidia-smi -i $GPU_INDEX -c 0"
    gpu::print_holders || true
    [[ -n $TIMESLICE ]] || return 0
    require "the time slice" setting::read time-slice
    [[ -n $CURRENT ]] || die "$EXIT_UNSUPPORTED" "$(gpu::title) has no time slice setting; omit --timeslice"
    [[ $TIMESLICE == "$CURRENT" ]] || card::require "changing the time slice"
}

print_in_force() {
    setting::read time-slice || CURRENT="could not be asked: $NOT_TOLD"
    cat <<TEXT
Time slicing is in force on $(gpu::title)
  clients:       $CLIENTS
  time slice:    ${CURRENT:-not a setting of this GPU}
  compute mode:  $GPU_COMPUTE_MODE, MPS off, MIG ${GPU_MIG_CURRENT/Disabled/off}
  undo:          ./gpu-configs/reset_time_slicing.sh
TEXT
}

main() {
    parse_arguments "$@"
    transaction::begin
    gpu::select
    check_preconditions
    state::save time-slicing "clients=$CLIENTS"
    [[ -z $TIMESLICE ]] || setting::set time-slice "$TIMESLICE"
    transaction::end print_in_force
}

main "$@"
