#!/usr/bin/env bash
#
# Cuts one GPU into MIG instances: MIG mode on, GPU instances with their compute instances. Which
# profiles there are, and what fits beside what, is asked from the driver.

# shellcheck source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source=lib/gpu.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/gpu.sh"
# shellcheck source=lib/mps.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/mps.sh"
# shellcheck source=lib/mig.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/mig.sh"

usage() {
    cat <<'TEXT'
Usage: sudo ./gpu-configs/setup_mig.sh PROFILE COUNT [options]
       sudo ./gpu-configs/setup_mig.sh PROFILE,PROFILE,... [options]

Switches MIG mode on and creates COUNT instances of one profile, or one instance of each profile of a
list, such as 2g.20gb,1g.10gb,1g.10gb. Whether they fit is checked before anything is changed. A profile
that this GPU lacks (1g.5gb is the A100 40GB's) is replaced by its own profile of as many slices.

  --gpu INDEX_OR_UUID    which GPU (default: the first)
  --dry-run              print what would be done, change nothing
  --help                 this text

Exit codes: 0 in force, 2 usage, 3 no driver or GPU, 4 not supported by this GPU, 5 no permission,
6 something else holds the GPU (named) or it has to be reset first. Undo: sudo ./gpu-configs/disable_mig.sh
TEXT
}

WANTED=() # one profile an instance

parse_arguments() {
    local -a positional=()
    local name
    cli::split "$@"
    set -- "${ARGUMENTS[@]}"
    while (($#)); do
        case $1 in
            -*) cli::common_flag "$@" ;;
            *)
                positional+=("$1")
                CONSUMED=1
                ;;
        esac
        shift "$CONSUMED"
    done
    ((${#positional[@]} == 1 || ${#positional[@]} == 2)) ||
        cli::usage_error "give a profile and a count, or a list of profiles"
    IFS=, read -ra WANTED <<<"${positional[0]}"
    for name in "${WANTED[@]}"; do
        [[ $name =~ ^[0-9]+g\.[0-9]+gb([+-][a-z.]+)*$ ]] ||
            cli::usage_error "'$name' is no MIG profile; one is written like 1g.10gb"
    done
    if ((${#positional[@]} == 2)); then
        ((${#WANTED[@]} == 1)) || cli::usage_error "a list of profiles takes no count"
        [[ ${positional[1]} =~ ^[1-9][0-9]?$ ]] ||
            cli::usage_error "COUNT must be a number from 1 to 99, not '${positional[1]}'"
        mapfile -t WANTED < <(yes "$name" | head -n "${positional[1]}")
    fi
}

check_preconditions() {
    [[ $GPU_MIG_CURRENT == Enabled || $GPU_MIG_CURRENT == Disabled ]] ||
        die "$EXIT_UNSUPPORTED" "$(gpu::title) has no MIG; A100, H100 and other large GPUs have"
    [[ $GPU_MIG_CURRENT == "$GPU_MIG_PENDING" ]] ||
        die "$EXIT_BUSY" "MIG mode is $GPU_MIG_CURRENT, pending $GPU_MIG_PENDING: the GPU has to be" \
            "reset, or the machine restarted, before anything else"
    if state::load mps && mps::answers "${STATE[pipe_directory]}"; then
        die "$EXIT_BUSY" "MPS is on (daemon of user ${STATE[user]});" \
            "switch it off: ./gpu-configs/disable_mps.sh"
    fi
    mig::read_profiles
    substitute_profiles
}

# Replaces each wanted profile that the GPU lacks; says so once a profile, however often it is wanted.
substitute_profiles() {
    local -A taken=()
    local -a unknown=()
    local -i i
    local name
    for name in "${WANTED[@]}"; do
        [[ -z ${PROFILE_ID[$name]:-} && -z ${taken[$name]:-} ]] || continue
        if find_substitute "$name"; then
            log "$(gpu::title) has no profile $name; taking $SUBSTITUTE."
        else
            unknown+=("$name")
        fi
        taken[$name]=$SUBSTITUTE
    done
    if ((${#unknown[@]} > 0)); then
        mig::print_profiles
        die "$EXIT_UNSUPPORTED" "this GPU has no profile $(IFS=, && printf '%s' "${unknown[*]}")," \
            "nor one plain profile like it"
    fi
    for i in "${!WANTED[@]}"; do WANTED[i]=${taken[${WANTED[i]}]:-${WANTED[i]}}; done
}

# Sets SUBSTITUTE to the plain profile with as many slices as $1; false, and the name itself, where
# there is none or more than one. Plain: no +me or the like, and none that trades instances for more
# memory (the H100 has 1g.10gb seven times, 1g.20gb only four times).
find_substitute() {
    local name
    local -i most=0 found=0
    SUBSTITUTE=$1
    for name in "${PROFILE_NAMES[@]}"; do
        [[ $name =~ ^${1%%g.*}g\.[0-9]+gb$ ]] || continue
        if ((PROFILE_TOTAL[$name] > most)); then
            most=${PROFILE_TOTAL[$name]}
            found=1
            SUBSTITUTE=$name
        elif ((PROFILE_TOTAL[$name] == most)); then
            found+=1
        fi
    done
    [[ $1 =~ ^[0-9]+g\.[0-9]+gb$ ]] && ((found == 1))
}

# Sets LAYOUT: the wanted profiles, the largest first, as they are created best.
order_wanted() {
    mapfile -t WANTED < <(printf '%s\n' "${WANTED[@]}" | sort -s -t g -k 1,1nr)
    LAYOUT=$(IFS=, && printf '%s' "${WANTED[*]}")
}

# Whether an earlier run's instances are still there. They do not outlive a reset of the GPU.
read_own_state() {
    PREVIOUS_MODE=$GPU_MIG_CURRENT
    INSTANCES=()
    [[ $GPU_MIG_CURRENT != Enabled ]] || mig::read_instances
    OURS=""
    state::load mig || return 0
    [[ $GPU_MIG_CURRENT != Enabled ]] || PREVIOUS_MODE=${STATE[previous_mig_mode]:-Enabled}
    OURS=$(mig::own_instances)
}

already_in_force() {
    [[ -n $OURS && $OURS == "${STATE[gpu_instances]}" ]] || return 1
    [[ ${STATE[profile]:-} == "$(layout_name)" && ${STATE[count]:-} == "${#WANTED[@]}" ]]
}

# How the state file calls the layout: the one profile, or the list.
layout_name() {
    local -r first=${WANTED[0]}
    if [[ -z ${LAYOUT//"$first"/} || ${LAYOUT//"$first"/} =~ ^,+$ ]]; then
        printf '%s' "$first"
    else
        printf '%s' "$LAYOUT"
    fi
}

check_that_it_fits() {
    local line name
    [[ -z $OURS ]] || die "$EXIT_BUSY" "the instances ${STATE[profile]:-?} (${STATE[count]:-?}) of an" \
        "earlier run are there; remove them first: sudo ./gpu-configs/disable_mig.sh"
    for name in "${WANTED[@]}"; do
        [[ -n ${PLACEMENT_STARTS[$name]:-} ]] ||
            die "$EXIT_UNSUPPORTED" "nvidia-smi lists no place for $name on $(gpu::title)"
    done
    OCCUPIED=0
    if ! fits "${WANTED[@]}"; then
        mig::print_profiles
        die "$EXIT_UNSUPPORTED" "$LAYOUT does not fit on $(gpu::title)"
    fi
    for line in "${INSTANCES[@]}"; do occupy "${line##* }"; done
    if ! fits "${WANTED[@]}"; then
        log "GPU instances that are there and were not made by this script (id, profile, place):"
        printf '  %s\n' "${INSTANCES[@]}" >&2
        die "$EXIT_BUSY" "$LAYOUT does not fit beside them"
    fi
}

# occupy START:SIZE
occupy() { OCCUPIED=$((OCCUPIED | ((1 << ${1#*:}) - 1) << ${1%:*})); }

# fits PROFILE...: whether there is a place for each beside what is OCCUPIED (a bit a memory slice).
fits() {
    local -r name=${1:-}
    local -ri before=$OCCUPIED
    local -i same=0 mask
    local start other
    [[ -n $name ]] || return 0
    # the totals rule out at once what would take the search below long
    for other in "$@"; do [[ $other != "$name" ]] || same+=1; done
    ((same <= PROFILE_TOTAL[$name])) || return 1
    for start in ${PLACEMENT_STARTS[$name]}; do
        mask=$((((1 << PLACEMENT_SIZE[$name]) - 1) << start))
        ((OCCUPIED & mask)) && continue
        OCCUPIED=$((OCCUPIED | mask))
        if fits "${@:2}"; then
            OCCUPIED=$before
            return 0
        fi
        OCCUPIED=$before
    done
    return 1
}

check_permission() {
    card::require "changing MIG"
    if [[ $GPU_MIG_CURRENT == Disabled ]]; then
        gpu::find_holders
        ((${#HOLDERS[@]} == 0)) || {
            gpu::print_holders
            die "$EXIT_BUSY" "MIG mode can only be switched on while nobody uses the GPU"
        }
    fi
}

# save_state GPU_INSTANCES. `instances_before` tells whose the instances are if this run is killed
# between creating them and saving their ids.
save_state() {
    state::save mig "gpu_uuid=$GPU_UUID" "previous_mig_mode=$PREVIOUS_MODE" \
        "profile=$(layout_name)" "count=${#WANTED[@]}" "gpu_instances=$1" \
        "instances_before=$BEFORE"
}

switch_on() {
    [[ $GPU_MIG_CURRENT != Enabled ]] || return 0
    undo::push mig::put_back_mode Disabled
    mig::change_mode Enabled
    ((DRY_RUN)) && return 0
    gpu::refresh
    [[ $GPU_MIG_CURRENT != Enabled || $GPU_MIG_PENDING != Enabled ]] || return 0
    if [[ $GPU_MIG_PENDING == Enabled && $RUN_OUTPUT != *"In use"* ]]; then
        undo::forget # a restart is what makes it effective: left pending, as it has to be
        die "$EXIT_BUSY" "MIG mode is pending: restart the machine (or reset the GPU), then run this" \
            "again; to take it back: sudo ./gpu-configs/disable_mig.sh. nvidia-smi said: $RUN_OUTPUT"
    fi
    card::failed "MIG mode is $GPU_MIG_CURRENT (pending: $GPU_MIG_PENDING), not Enabled"
}

create_instances() {
    local created
    local -a ids
    undo::push destroy_new
    run --card nvidia-smi mig -i "$GPU_UUID" -cgi "$LAYOUT" -C
    ((DRY_RUN)) && return 0
    created=$(new_instances)
    IFS=, read -ra ids <<<"$created"
    ((${#ids[@]} == ${#WANTED[@]})) ||
        card::failed "only ${#ids[@]} of ${#WANTED[@]} instances were created"
    check_devices
    save_state "$created"
}

new_instances() {
    mig::read_instances
    mig::subtract "$(mig::instance_ids)" "$BEFORE"
}

destroy_new() { mig::destroy "$(new_instances)"; }

# A client needs a MIG device, that is a GPU instance with a compute instance in it.
check_devices() {
    local -a devices
    mapfile -t devices < <(mig::devices)
    ((${#devices[@]} - DEVICES_BEFORE == ${#WANTED[@]})) ||
        card::failed "$((${#devices[@]} - DEVICES_BEFORE)) of ${#WANTED[@]} MIG devices are there"
}

apply() {
    BEFORE=$(mig::instance_ids)
    DEVICES_BEFORE=$(mig::devices | wc -l)
    undo::push state::put_back mig "$(state::text mig)"
    save_state ""
    switch_on
    create_instances
    undo::forget
}

print_in_force() {
    if ((DRY_RUN)); then
        printf 'Dry run: nothing was changed.\n'
        return 0
    fi
    printf 'MIG is in force on %s\n' "$(gpu::title)"
    mig::devices | while read -r uuid profile; do printf '  %-12s %s\n' "$profile" "$uuid"; done
    printf '  a client sees one: CUDA_VISIBLE_DEVICES=MIG-...\n'
    printf '  undo: sudo ./gpu-configs/disable_mig.sh\n'
}

main() {
    parse_arguments "$@"
    transaction::begin
    user::resolve
    gpu::select
    check_preconditions
    order_wanted
    read_own_state
    if ! already_in_force; then
        check_that_it_fits
        check_permission
        apply
    fi
    print_in_force
}

main "$@"
