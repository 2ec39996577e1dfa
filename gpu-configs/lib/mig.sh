# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# Reading and destroying MIG instances. Profiles and their places differ by GPU and are asked for,
# never assumed. The listings of profiles and places were seen on an H100; those with MIG mode on
# (instances, devices, processes of an instance) follow NVIDIA's MIG user guide and are unverified.

declare -A PROFILE_ID=() PROFILE_FREE=() PROFILE_TOTAL=() PLACEMENT_STARTS=() PLACEMENT_SIZE=()

# Fills the PROFILE_* and PLACEMENT_* tables, by profile name.
mig::read_profiles() {
    local name id counts starts size
    PROFILE_NAMES=()
    while read -r name id counts; do
        [[ $name =~ ^[0-9]+g\.[0-9]+gb && $id =~ ^[0-9]+$ && $counts =~ ^[0-9]+/[0-9]+$ ]] || continue
        PROFILE_NAMES+=("$name")
        PROFILE_ID[$name]=$id
        PROFILE_FREE[$name]=${counts%/*}
        PROFILE_TOTAL[$name]=${counts#*/}
    done < <({ nvidia-smi mig -lgip 2>/dev/null || true; } |
        awk -v gpu="$GPU_INDEX" '$1 == "|" && $2 == gpu && $3 == "MIG" { print $4, $5, $6 }')
    ((${#PROFILE_NAMES[@]} > 0)) ||
        die "$EXIT_UNSUPPORTED" "nvidia-smi lists no MIG profiles for $(gpu::title)"
    while read -r id starts size; do
        for name in "${PROFILE_NAMES[@]}"; do
            [[ ${PROFILE_ID[$name]} == "$id" ]] || continue
            PLACEMENT_STARTS[$name]=${starts//,/ }
            PLACEMENT_SIZE[$name]=$size
        done
    done < <({ nvidia-smi mig -lgipp 2>/dev/null || true; } |
        sed -nE "s/^GPU +$GPU_INDEX Profile ID +([0-9]+) Placements? *: *\{([0-9,]+)\}:([0-9]+).*/\1 \2 \3/p")
}

# Prints the profiles of this GPU, on stderr.
mig::print_profiles() {
    local name
    log "Profiles of $(gpu::title):"
    for name in "${PROFILE_NAMES[@]}"; do
        log "  $name  (${PROFILE_FREE[$name]} of ${PROFILE_TOTAL[$name]} free)"
    done
}

# Fills INSTANCES with one line `ID PROFILE START:SIZE` a GPU instance; none is no error.
mig::read_instances() {
    mapfile -t INSTANCES < <({ nvidia-smi mig -lgi 2>/dev/null || true; } |
        awk -v gpu="$GPU_INDEX" '$1 == "|" && $2 == gpu && $3 == "MIG" { print $6, $4, $7 }')
}

# mig::instance_ids: the ids of INSTANCES, separated by commas.
mig::instance_ids() {
    local line ids=""
    for line in "${INSTANCES[@]}"; do ids+=",${line%% *}"; done
    printf '%s' "${ids#,}"
}

# mig::subtract IDS IDS: those of the first list that are not in the second; both with commas.
mig::subtract() {
    local id rest=""
    for id in ${1//,/ }; do
        [[ ,$2, == *",$id,"* ]] || rest+=",$id"
    done
    printf '%s' "${rest#,}"
}

# Prints `UUID PROFILE` for each MIG device of the chosen GPU.
mig::devices() {
    nvidia-smi -L | awk -v gpu="$GPU_UUID" '
        /^GPU / { here = index($0, gpu) > 0 }
        here && $1 == "MIG" { sub(/\)$/, "", $NF); print $NF, $2 }'
}

# mig::has_layout PROFILE,PROFILE,...: whether there is a MIG device for each profile of the list.
mig::has_layout() {
    local -a devices wanted
    local name
    local -A free=()
    mapfile -t devices < <(mig::devices)
    for name in "${devices[@]#* }"; do free[$name]=$((${free[$name]:-0} + 1)); done
    IFS=, read -ra wanted <<<"$1"
    for name in "${wanted[@]}"; do
        ((${free[$name]:-0} > 0)) || return 1
        free[$name]=$((free[$name] - 1))
    done
}

# mig::unknown_profiles PROFILE,PROFILE,...: prints, with commas, those that are not in PROFILE_NAMES.
mig::unknown_profiles() {
    local -a wanted
    local name unknown=""
    IFS=, read -ra wanted <<<"$1"
    for name in "${wanted[@]}"; do
        [[ -n ${PROFILE_ID[$name]:-} || ,$unknown, == *",$name,"* ]] || unknown+=",$name"
    done
    printf '%s' "${unknown#,}"
}

# mig::holders IDS: one readable line a process on these GPU instances, from the process table, the
# only listing that names the instance.
mig::holders() {
    local gi pid name
    while read -r gi pid name; do
        [[ ,$1, != *",$gi,"* ]] || printf 'pid %s (user %s): %s on GPU instance %s\n' \
            "$pid" "$(gpu::owner "$pid")" "$(printable "$name")" "$gi"
    done < <(nvidia-smi | awk -v gpu="$GPU_INDEX" '
        $1 == "|" && $2 == gpu && $3 ~ /^[0-9]+$/ && $5 ~ /^[0-9]+$/ && $6 ~ /^[CGM+]+$/ {
            print $3, $5, $7 }')
}

# mig::destroy IDS: compute instances first; ends the script where an instance stays.
mig::destroy() {
    local left
    [[ -n $1 ]] || return 0
    run --card nvidia-smi mig -i "$GPU_UUID" -dci -gi "$1"
    run --card nvidia-smi mig -i "$GPU_UUID" -dgi -gi "$1"
    ((DRY_RUN)) && return 0
    mig::read_instances
    left=$(mig::subtract "$1" "$(mig::subtract "$1" "$(mig::instance_ids)")")
    [[ -z $left ]] || card::failed "the GPU instances $left could not be destroyed"
}

# mig::put_back_mode Enabled|Disabled: reads current and pending back, since nvidia-smi ends well with
# a change that is only pending.
mig::put_back_mode() {
    gpu::refresh
    [[ $GPU_MIG_CURRENT != "$1" || $GPU_MIG_PENDING != "$1" ]] || return 0
    mig::change_mode "$1"
    ((DRY_RUN)) && return 0
    gpu::refresh
    [[ $GPU_MIG_CURRENT == "$1" && $GPU_MIG_PENDING == "$1" ]] || card::failed \
        "MIG mode is $GPU_MIG_CURRENT (pending: $GPU_MIG_PENDING), not $1"
}

mig::change_mode() {
    local -rA numbers=([Enabled]=1 [Disabled]=0)
    run --card nvidia-smi -i "$GPU_UUID" -mig "${numbers[$1]}"
}

# mig::own_instances: the ids of INSTANCES that the loaded state claims. A run that was killed before it
# saved the ids has still said which instances were there before.
mig::own_instances() {
    local -r there=$(mig::instance_ids)
    if [[ -n ${STATE[gpu_instances]:-} ]]; then
        mig::subtract "$there" "$(mig::subtract "$there" "${STATE[gpu_instances]}")"
    else
        mig::subtract "$there" "${STATE[instances_before]:-}"
    fi
}
