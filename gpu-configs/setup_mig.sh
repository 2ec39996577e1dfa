#!/bin/bash -p
# Usage: sudo ./gpu-configs/setup_mig.sh PROFILE COUNT [options]
#        sudo ./gpu-configs/setup_mig.sh PROFILE,PROFILE,... [options]
#
# Switches MIG mode on and creates COUNT instances of one profile, or one instance of each profile of a
# list, such as 2g.20gb,1g.10gb,1g.10gb. A profile that this GPU lacks (1g.5gb is the A100 40GB's) is
# replaced by its own profile of as many slices.
# Undo: sudo ./gpu-configs/disable_mig.sh

# shellcheck source=lib/common.sh
source "${0%"${0##*/}"}lib/common.sh"

WANTED=() # one profile an instance

parse_arguments() {
    cli::parse 2 "$@"
    ((${#POSITIONAL[@]} > 0)) || cli::usage_error "give a profile and a count, or a list of profiles"
    [[ ${POSITIONAL[0]} =~ ^$MIG_PROFILE_PATTERN(,$MIG_PROFILE_PATTERN)*$ ]] ||
        cli::usage_error "'${POSITIONAL[0]}' is no MIG profile, such as 1g.10gb, and no list of them"
    IFS=, read -ra WANTED <<<"${POSITIONAL[0]}"
    ((${#POSITIONAL[@]} == 2)) || return 0
    ((${#WANTED[@]} == 1)) || cli::usage_error "a list of profiles takes no count"
    [[ ${POSITIONAL[1]} =~ ^[1-9][0-9]?$ ]] ||
        cli::usage_error "COUNT must be a number from 1 to 99, not '${POSITIONAL[1]}'"
    mapfile -t WANTED < <(yes "${WANTED[0]}" | head -n "${POSITIONAL[1]}")
}

check_preconditions() {
    require "the MIG mode" setting::read MIG-mode
    [[ -n $CURRENT ]] ||
        die "$EXIT_UNSUPPORTED" "$(gpu::title) has no MIG; A100, H100 and other large GPUs have"
    [[ $GPU_MIG_CURRENT == "$GPU_MIG_PENDING" ]] ||
        die "$EXIT_BUSY" "MIG mode is $GPU_MIG_MODE: reset the GPU, or restart the machine, first"
    mps::refuse_own
    require "the MIG profiles and places of $(gpu::title)" mig::read_profiles
    ((${#PROFILE_NAMES[@]})) || die "$EXIT_UNSUPPORTED" "nvidia-smi lists no MIG profiles for $(gpu::title)"
    substitute_profiles
    # the largest first, as they are created best
    mapfile -t WANTED < <(printf '%s\n' "${WANTED[@]}" | sort -s -t g -k 1,1nr)
    LAYOUT=$(join "${WANTED[@]}")
    mig::find_own
    PREVIOUS_MODE=${STATE[previous_mig_mode]:-Enabled}
    [[ $GPU_MIG_CURRENT == Enabled ]] || PREVIOUS_MODE=Disabled
    BEFORE=$IDS
}

substitute_profiles() {
    local name substitute unknown=""
    for name in $(printf '%s\n' "${WANTED[@]}" | awk '!seen[$0]++'); do
        [[ -z ${PROFILE_TOTAL[$name]:-} ]] || continue
        substitute=$(find_substitute "$name")
        if [[ -n $substitute ]]; then
            log "$(gpu::title) has no profile $name; taking $substitute."
            mapfile -t WANTED < <(printf '%s\n' "${WANTED[@]}" | sed "s/^$name\$/$substitute/")
        else
            unknown+=,$name
        fi
    done
    [[ -n $unknown ]] || return 0
    mig::print_profiles
    die "$EXIT_UNSUPPORTED" "this GPU has no profile ${unknown#,}, nor one plain profile like it"
}

# find_substitute PROFILE: prints the plain profile with as many slices, if there is one. Plain: no +me or
# the like, and none that trades instances for more memory (the H100 has 1g.10gb seven times, 1g.20gb only
# four times).
find_substitute() {
    local name
    [[ $1 != *[+-]* ]] || return 0
    for name in "${PROFILE_NAMES[@]}"; do
        [[ $name != "${1%%g.*}"g.* || $name == *[+-]* ]] || printf '%d %s\n' "${PROFILE_TOTAL[$name]}" "$name"
    done | sort -rn | awk '
        NR == 1 { most = $1; name = $2 } NR == 2 && $1 == most { name = "" } END { print name }'
}

check_room_and_permission() {
    local line start size
    local -i occupied=0
    [[ -z $OURS ]] || die "$EXIT_BUSY" "the instances ${STATE[layout]:-?} of an earlier run" \
        "are there; remove them first: sudo ./gpu-configs/disable_mig.sh"
    if ! fits 0 "${WANTED[@]}"; then
        mig::print_profiles
        die "$EXIT_UNSUPPORTED" "$LAYOUT does not fit on $(gpu::title)"
    fi
    for line in "${INSTANCES[@]}"; do
        IFS=: read -r start size <<<"${line##* }"
        occupied=$((occupied | ((1 << size) - 1) << start))
    done
    if ! fits "$occupied" "${WANTED[@]}"; then
        log "GPU instances that are there and were not made by this script (id, profile, place):"
        log "$(printf '  %s\n' "${INSTANCES[@]}")"
        die "$EXIT_BUSY" "$LAYOUT does not fit beside them"
    fi
    card::require "changing MIG"
    [[ $GPU_MIG_CURRENT == Disabled ]] || return 0
    require "who uses $(gpu::title)" gpu::find_holders
    ! gpu::print_holders || die "$EXIT_BUSY" "MIG mode can only be switched on while nobody uses the GPU"
}

# fits OCCUPIED PROFILE...: whether there is a place for each next to what is occupied (a bit a slice).
fits() {
    local -r name=${2:-}
    local -i same=0 mask
    local start other
    [[ -n $name ]] || return 0
    # the totals rule out at once what would take the search below long
    for other in "${@:2}"; do [[ $other != "$name" ]] || same+=1; done
    ((same <= ${PROFILE_TOTAL[$name]})) || return 1
    for start in ${PLACEMENT_STARTS[$name]}; do
        mask=$((((1 << ${PLACEMENT_SIZE[$name]}) - 1) << start))
        ((!($1 & mask))) && fits $(($1 | mask)) "${@:3}" && return 0
    done
    return 1
}

# `instances_before` tells whose the instances are if this is killed before it has saved their ids. A client
# needs a MIG device, that is a GPU instance with a compute instance in it.
apply() {
    local created
    local -a ids plan=("previous_mig_mode=$PREVIOUS_MODE" "layout=$LAYOUT" "instances_before=$BEFORE" "boot=$BOOT")
    local -i devices
    require "the MIG devices of $(gpu::title)" mig::find_devices
    devices=-${#MIG_DEVICES[@]}
    state::save mig "${plan[@]}" "gpu_instances="
    [[ $GPU_MIG_CURRENT == Enabled ]] || undo::push setting::change MIG-mode Disabled
    setting::change MIG-mode Enabled
    undo::push destroy_new
    run card::change nvidia-smi mig -i "$GPU_UUID" -cgi "$LAYOUT" -C
    ((!DRY_RUN)) || return 0
    mig::require_instances
    created=$(mig::subtract "$IDS" "$BEFORE")
    IFS=, read -ra ids <<<"$created"
    ((${#ids[@]} == ${#WANTED[@]})) || card::failed "only ${#ids[@]} of ${#WANTED[@]} instances were created"
    require "the MIG devices of $(gpu::title)" mig::find_devices
    devices+=${#MIG_DEVICES[@]}
    ((devices == ${#WANTED[@]})) || card::failed "$devices of ${#WANTED[@]} MIG devices are there"
    state::save mig "${plan[@]}" "gpu_instances=$created"
}

destroy_new() {
    mig::require_instances
    mig::destroy "$(mig::subtract "$IDS" "$BEFORE")"
}

print_in_force() {
    mig::find_devices || warn "the MIG devices could not be asked: $NOT_TOLD"
    printf 'MIG is in force on %s\n' "$(gpu::title)"
    printf '  %s\n' "${MIG_DEVICES[@]}"
    printf '  a client sees one: CUDA_VISIBLE_DEVICES=MIG-...\n'
    printf '  undo: sudo ./gpu-configs/disable_mig.sh\n'
}

main() {
    parse_arguments "$@"
    transaction::begin
    gpu::select
    check_preconditions
    if [[ -z $OURS || $OURS != "${STATE[gpu_instances]:-}" || ${STATE[layout]:-} != "$LAYOUT" ]]; then
        check_room_and_permission
        apply
    fi
    transaction::end print_in_force
}

main "$@"
