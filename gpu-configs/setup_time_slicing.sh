#!/usr/bin/env bash
#
# Time slicing is what CUDA does by itself when several processes use one GPU: compute mode Default, no
# MPS, MIG off. So this script checks that nothing stands in the way, sets the length of a slice if
# asked, and records for how many clients the GPU is meant.

# shellcheck source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=lib/gpu.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/gpu.sh"
# shellcheck source=lib/mps.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/mps.sh"

usage() {
    cat <<'TEXT'
Usage: ./gpu-configs/setup_time_slicing.sh CLIENTS [options]

Prepares one GPU for time slicing among CLIENTS processes, and says what is in force.

  CLIENTS                     how many clients may share the GPU (1 to 9999)
  --timeslice LENGTH          default, short, medium or long; needs root. Without it the GPU keeps
                              the length it has, and the script needs no root
  --kubernetes-config FILE    also write the matching configuration of the NVIDIA Kubernetes device
                              plugin (sharing.timeSlicing); needs 2 clients or more
  --gpu INDEX_OR_UUID         which GPU (default: the first)
  --dry-run                   print what would be done, change nothing
  --help                      this text

Exit codes: 0 in force, 2 usage, 3 no driver or GPU, 4 not supported by this GPU, 5 no permission,
6 something else holds the GPU (named). Undo: ./gpu-configs/reset_time_slicing.sh
TEXT
}

CLIENTS=""
TIMESLICE=""
KUBERNETES_CONFIG=""

parse_arguments() {
    cli::split "$@"
    set -- "${ARGUMENTS[@]}"
    while (($#)); do
        CONSUMED=2
        case $1 in
            --timeslice)
                cli::value "$@"
                TIMESLICE=${VALUE,,}
                ;;
            --kubernetes-config)
                cli::value "$@"
                KUBERNETES_CONFIG=$VALUE
                ;;
            [0-9]*)
                [[ -z $CLIENTS ]] || cli::usage_error "only one number of clients can be given"
                CLIENTS=$1
                CONSUMED=1
                ;;
            *) cli::common_flag "$@" ;;
        esac
        shift "$CONSUMED"
    done
    [[ $CLIENTS =~ ^[1-9][0-9]{0,3}$ ]] ||
        cli::usage_error "CLIENTS must be a number from 1 to 9999, not '$CLIENTS'"
    case $TIMESLICE in
        "" | default | short | medium | long) TIMESLICE=${TIMESLICE^} ;;
        *) cli::usage_error "--timeslice is default, short, medium or long, not '$TIMESLICE'" ;;
    esac
    check_kubernetes_config
}

check_kubernetes_config() {
    [[ -n $KUBERNETES_CONFIG ]] || return 0
    ((CLIENTS >= 2)) || cli::usage_error "--kubernetes-config needs at least 2 clients to share"
    [[ -d $(dirname -- "$KUBERNETES_CONFIG") ]] ||
        cli::usage_error "there is no folder $(dirname -- "$KUBERNETES_CONFIG") to write into"
    [[ ! -e $KUBERNETES_CONFIG ]] || [[ $(cat -- "$KUBERNETES_CONFIG") == "$(kubernetes_config)" ]] ||
        cli::usage_error "$KUBERNETES_CONFIG exists already; name a new file"
}

kubernetes_config() {
    cat <<TEXT
# NVIDIA Kubernetes device plugin: each GPU of the node is offered $CLIENTS times.
version: v1
sharing:
  timeSlicing:
    resources:
      - name: nvidia.com/gpu
        replicas: $CLIENTS
TEXT
}

check_preconditions() {
    local server
    if [[ $GPU_MIG_CURRENT == Enabled ]]; then
        die "$EXIT_BUSY" "MIG mode is on, $(gpu::title) cannot be shared as a whole;" \
            "switch it off: sudo ./gpu-configs/disable_mig.sh"
    fi
    [[ $GPU_MIG_PENDING != Enabled ]] ||
        warn "MIG mode is pending: the GPU will be in MIG mode after its next reset"
    if state::load mps && mps::answers "${STATE[pipe_directory]}"; then
        die "$EXIT_BUSY" "MPS is on (daemon of user ${STATE[user]});" \
            "switch it off: ./gpu-configs/disable_mps.sh"
    fi
    mps::find_daemons
    ((${#MPS_OWN[@]} == 0)) || mps::refuse_other_daemons
    gpu::find_holders
    for server in "${HOLDERS[@]}"; do
        [[ $server != *nvidia-cuda-mps-server* ]] ||
            die "$EXIT_BUSY" "an MPS server holds $(gpu::title): $server"
    done
    ((${#MPS_FOREIGN[@]} == 0)) ||
        warn "another user's MPS control daemon is running: ${MPS_FOREIGN[*]}"
    [[ $GPU_COMPUTE_MODE == Default ]] ||
        die "$EXIT_BUSY" "compute mode is $GPU_COMPUTE_MODE, so clients cannot share;" \
            "if nobody needs it so: sudo nvidia-smi -i $GPU_INDEX -c DEFAULT"
    gpu::print_holders
}

# What the slice was before any of our changes. A saved value counts only while the slice still is
# what we set: a driver reload resets it, and then the present one is the previous one.
remember_previous_timeslice() {
    CURRENT_TIMESLICE=$(gpu::timeslice)
    PREVIOUS_TIMESLICE=$CURRENT_TIMESLICE
    if state::load time-slicing && [[ ${STATE[timeslice]:-} == "$CURRENT_TIMESLICE" ]]; then
        PREVIOUS_TIMESLICE=${STATE[previous_timeslice]:-$CURRENT_TIMESLICE}
    fi
    [[ -n $TIMESLICE ]] || TIMESLICE=$CURRENT_TIMESLICE
    [[ -n $CURRENT_TIMESLICE || -z $TIMESLICE ]] ||
        die "$EXIT_UNSUPPORTED" "$(gpu::title) has no time slice setting; leave --timeslice out"
    [[ $TIMESLICE == "$CURRENT_TIMESLICE" ]] || card::require "changing the time slice"
}

apply() {
    undo::push state::put_back time-slicing "$(state::text time-slicing)"
    state::save time-slicing "gpu_uuid=$GPU_UUID" "clients=$CLIENTS" "timeslice=$TIMESLICE" \
        "previous_timeslice=$PREVIOUS_TIMESLICE"
    if [[ $TIMESLICE != "$CURRENT_TIMESLICE" ]]; then
        undo::push gpu::put_back_timeslice "$CURRENT_TIMESLICE"
        gpu::change_timeslice "$TIMESLICE"
        ((DRY_RUN)) || [[ $(gpu::timeslice) == "$TIMESLICE" ]] ||
            card::failed "the time slice is $(gpu::timeslice), not $TIMESLICE"
    fi
    write_kubernetes_config
}

write_kubernetes_config() {
    [[ -n $KUBERNETES_CONFIG && ! -e $KUBERNETES_CONFIG ]] || return 0
    # shellcheck disable=SC2016 # the inner shell expands
    run --user --note "write $KUBERNETES_CONFIG" bash -c '
        set -o noclobber
        printf "%s\n" "$2" >"$1"
    ' write "$KUBERNETES_CONFIG" "$(kubernetes_config)" ||
        die "$EXIT_PERMISSION" "cannot write $KUBERNETES_CONFIG as $INVOKER_NAME"
}

print_in_force() {
    if ((DRY_RUN)); then
        printf 'Dry run: nothing was changed.\n'
        return 0
    fi
    cat <<TEXT
Time slicing is in force on $(gpu::title)
  clients:       $CLIENTS
  time slice:    ${TIMESLICE:-not a setting of this GPU}
  compute mode:  Default, MPS off, MIG ${GPU_MIG_CURRENT/Disabled/off}
  undo:          ./gpu-configs/reset_time_slicing.sh
TEXT
}

main() {
    parse_arguments "$@"
    transaction::begin
    user::resolve
    gpu::select
    check_preconditions
    remember_previous_timeslice
    apply
    undo::forget
    print_in_force
}

main "$@"
