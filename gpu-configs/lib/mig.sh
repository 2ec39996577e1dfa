# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# Reading and destroying MIG instances. Profiles and their places differ by GPU and are asked for,
# never assumed. The listings of profiles and places were seen on an H100; those with MIG mode on
# (instances, devices, processes of an instance) follow NVIDIA's MIG user guide and are unverified.

# A profile as nvidia-smi calls it: 1g.10gb, 1g.10gb+me, 1g.24gb+me.all, 2g.48gb+gfx.
readonly MIG_PROFILE_PATTERN='[0-9]+g\.[0-9]+gb([+-][a-z.]+)*'

declare -A PROFILE_ID=() PROFILE_FREE=() PROFILE_TOTAL=() PLACEMENT_STARTS=() PLACEMENT_SIZE=()

# mig::not_told WHAT ANSWER: ends the script: what it needs to know could not be asked.
mig::not_told() {
    ((EUID == 0)) || card::require "reading the $1"
    die "$EXIT_FAILED" "the $1 of $(gpu::title) could not be asked; nvidia-smi said:" \
        "$(printable "${2%%$'\n'*}")"
}

# Fills the PROFILE_* and PLACEMENT_* tables, by profile name.
mig::read_profiles() {
    local listing name id counts starts size
    local -A name_of=()
    PROFILE_NAMES=()
    listing=$(gpu::ask mig -lgip) || true
    while read -r name id counts; do
        [[ $name =~ ^$MIG_PROFILE_PATTERN$ && $id =~ ^[0-9]+$ && $counts =~ ^[0-9]+/[0-9]+$ ]] || continue
        PROFILE_NAMES+=("$name")
        PROFILE_ID[$name]=$id
        name_of[$id]=$name
        PROFILE_FREE[$name]=${counts%/*}
        PROFILE_TOTAL[$name]=${counts#*/}
    done < <(awk -v gpu="$GPU_INDEX" '$1 == "|" && $2 == gpu && $3 == "MIG" { print $4, $5, $6 }' <<<"$listing")
    if ((${#PROFILE_NAMES[@]} == 0)); then
        [[ $listing == *"GPU instance profiles"* || $listing == *"No MIG-supported devices"* ]] ||
            mig::not_told "MIG profiles" "$listing"
        die "$EXIT_UNSUPPORTED" "nvidia-smi lists no MIG profiles for $(gpu::title)"
    fi
    listing=$(gpu::ask mig -lgipp) || true
    [[ $listing == *"Profile ID"* ]] || mig::not_told "places of MIG profiles" "$listing"
    while read -r id starts size; do
        name=${name_of[$id]:-}
        [[ -n $name ]] || continue
        PLACEMENT_STARTS[$name]=${starts//,/ }
        PLACEMENT_SIZE[$name]=$size
    done < <(sed -nE "s/^GPU +$GPU_INDEX Profile ID +([0-9]+) Placements? *: *\{([0-9,]+)\}:([0-9]+).*/\1 \2 \3/p" <<<"$listing")
}

# Prints the profiles of this GPU, on stderr.
mig::print_profiles() {
    local name
    log "Profiles of $(gpu::title):"
    for name in "${PROFILE_NAMES[@]}"; do
        log "  $name  (${PROFILE_FREE[$name]} of ${PROFILE_TOTAL[$name]} free)"
    done
}

# mig::join WORD...: with commas between.
mig::join() {
    local IFS=,
    printf '%s' "$*"
}

# Fills INSTANCES with one line `ID PROFILE START:SIZE` a GPU instance; none where MIG mode is off.
mig::read_instances() {
    local listing
    INSTANCES=()
    [[ $GPU_MIG_CURRENT == Enabled ]] || return 0
    listing=$(gpu::ask mig -lgi) || true
    mapfile -t INSTANCES < <(awk -v gpu="$GPU_INDEX" '$1 == "|" && $2 == gpu && $3 == "MIG" { print $6, $4, $7 }' <<<"$listing")
    # the header alone: other GPUs have instances
    ((${#INSTANCES[@]} > 0)) || [[ $listing == *"| GPU instances"* || $listing == *"No GPU instances found"* ||
        $listing == *"No MIG-enabled devices"* ]] || mig::not_told "GPU instances" "$listing"
}

# mig::instance_ids: the ids of INSTANCES, with commas.
mig::instance_ids() { mig::join "${INSTANCES[@]%% *}"; }

# mig::subtract IDS IDS: those of the first list that are not in the second; both with commas.
mig::subtract() {
    local id rest=""
    for id in ${1//,/ }; do
        [[ ,$2, == *",$id,"* ]] || rest+=",$id"
    done
    printf '%s' "${rest#,}"
}

mig::intersect() { mig::subtract "$1" "$(mig::subtract "$1" "$2")"; }

# Fills MIG_DEVICES with `UUID PROFILE` for each MIG device of the chosen GPU. False, with NOT_TOLD, where
# the listing does not even name the GPU.
mig::find_devices() {
    local listing
    MIG_DEVICES=()
    listing=$(gpu::ask -L) || true
    NOT_TOLD=$(printable "${listing%%$'\n'*}")
    [[ $listing == *"(UUID: $GPU_UUID)"* ]] || return 1
    mapfile -t MIG_DEVICES < <(awk -v gpu="$GPU_UUID" '
        /^[^ ]/ { here = index($0, gpu) > 0 }
        here && $1 == "MIG" { sub(/\)$/, "", $NF); print $NF, $2 }' <<<"$listing")
}

mig::require_devices() { mig::find_devices || mig::not_told "MIG devices" "$NOT_TOLD"; }

# mig::print_devices: those of MIG_DEVICES, indented by $1.
mig::print_devices() {
    local device
    for device in "${MIG_DEVICES[@]}"; do printf '%s%-12s %s\n' "$1" "${device#* }" "${device%% *}"; done
}

# mig::refuse_holders IDS: ends with 6 where processes are on these GPU instances, by the process table,
# the only listing that names the instance.
mig::refuse_holders() {
    local table gi pid name
    local -a holders=()
    [[ -n $1 ]] || return 0
    table=$(gpu::ask) || true
    [[ $table == *"| Processes:"* ]] || mig::not_told "processes on the instances" "$table"
    while read -r gi pid name; do
        [[ ,$1, != *",$gi,"* ]] ||
            holders+=("pid $pid (user $(gpu::owner "$pid")): $(printable "$name") on GPU instance $gi")
    done < <(awk -v gpu="$GPU_INDEX" '
        $1 == "|" && $2 == gpu && $3 ~ /^[0-9]+$/ && $5 ~ /^[0-9]+$/ && $6 ~ /^[CGM+]+$/ {
            print $3, $5, $7 }' <<<"$table")
    ((${#holders[@]} > 0)) || return 0
    printf '%s\n' "${holders[@]}" >&2
    die "$EXIT_BUSY" "the instances are in use by the processes above; end them first"
}

# mig::destroy IDS: compute instances first; ends the script where an instance stays.
mig::destroy() {
    local left
    [[ -n $1 ]] || return 0
    run --card nvidia-smi mig -i "$GPU_UUID" -dci -gi "$1"
    run --card nvidia-smi mig -i "$GPU_UUID" -dgi -gi "$1"
    ((DRY_RUN)) && return 0
    mig::read_instances
    left=$(mig::intersect "$1" "$(mig::instance_ids)")
    [[ -z $left ]] || card::failed "the GPU instances $left could not be destroyed"
}

# mig::put_back_mode Enabled|Disabled: reads current and pending back, since nvidia-smi ends well with
# a change that is only pending.
mig::put_back_mode() {
    gpu::refresh
    [[ $GPU_MIG_CURRENT != "$1" || $GPU_MIG_PENDING != "$1" ]] || return 0
    mig::change_mode "$1"
    ((!DRY_RUN)) || return 0
    [[ $GPU_MIG_CURRENT == "$1" && $GPU_MIG_PENDING == "$1" ]] || card::failed \
        "MIG mode is $GPU_MIG_CURRENT (pending: $GPU_MIG_PENDING), not $1"
}

mig::change_mode() {
    local -rA numbers=([Enabled]=1 [Disabled]=0)
    run --card nvidia-smi -i "$GPU_UUID" -mig "${numbers[$1]}"
    gpu::refresh
}

# mig::own_instances: the ids of INSTANCES that the loaded state claims. A run that was killed before it
# saved the ids has still said which instances were there before.
mig::own_instances() {
    local -r there=$(mig::instance_ids)
    if [[ -n ${STATE[gpu_instances]:-} ]]; then
        mig::intersect "$there" "${STATE[gpu_instances]}"
    else
        mig::subtract "$there" "${STATE[instances_before]:-}"
    fi
}
