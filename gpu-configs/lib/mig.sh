# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# Reading and destroying MIG instances. Profiles and their places differ by GPU and are asked for,
# never assumed. The listings of profiles and places were seen on an H100; those with MIG mode on
# (instances, devices, processes of an instance) follow NVIDIA's MIG user guide and are unverified.
# Lists of instances are their ids with commas between.

# A profile as nvidia-smi calls it: 1g.10gb, 1g.10gb+me, 1g.24gb+me.all, 2g.48gb+gfx.
readonly MIG_PROFILE_PATTERN='[0-9]+g[.][0-9]+gb([+-][a-z.]+)*'

# A question: fills PROFILE_NAMES and, by name, the tables of how many are free and there, and of the places.
mig::read_profiles() {
    local profiles places name counts size starts
    PROFILE_NAMES=()
    declare -gA PROFILE_FREE=() PROFILE_TOTAL=() PLACEMENT_SIZE=() PLACEMENT_STARTS=()
    profiles=$(gpu::ask mig -lgip) || true
    [[ $profiles == *"| GPU instance profiles"* || $profiles == *"No MIG-supported devices"* ]] ||
        not_told "$profiles" || return
    places=$(gpu::ask mig -lgipp) || true
    [[ $places == *"Profile ID"* || $profiles != *"GPU instance profiles"* ]] || not_told "$places" || return
    while read -r name counts size starts; do
        PROFILE_NAMES+=("$name")
        PROFILE_FREE[$name]=${counts%/*}
        PROFILE_TOTAL[$name]=${counts#*/}
        PLACEMENT_SIZE[$name]=$size
        PLACEMENT_STARTS[$name]=$starts
    done < <(awk -v gpu="$GPU_INDEX" -v pattern="^$MIG_PROFILE_PATTERN\$" '
        # |   0  MIG 1g.10gb          19     7/7 ...
        $1 == "|" && $2 == gpu && $3 == "MIG" && $4 ~ pattern && $6 ~ /^[0-9]+\/[0-9]+$/ {
            ids[++count] = $5; row[$5] = $4 " " $6
        }
        # GPU  0 Profile ID 19 Placements: {0,1,2,3,4,5,6}:1
        $1 == "GPU" && $2 == gpu && $3 == "Profile" && match($0, /\{[0-9,]+\}:[0-9]+/) {
            split(substr($0, RSTART + 1, RLENGTH - 1), place, /\}:/)
            gsub(",", " ", place[1]); places[$5] = place[2] " " place[1]
        }
        END { for (i = 1; i <= count; i++) print row[ids[i]], places[ids[i]] }' <<<"$profiles"$'\n'"$places")
    # of one card that fails the others' rows are there
    ((${#PROFILE_NAMES[@]})) || [[ $profiles != *"Failed to"* ]] || not_told "$profiles"
}

mig::print_profiles() {
    local name
    log "Profiles of $(gpu::title):"
    for name in "${PROFILE_NAMES[@]}"; do
        log "  $name  (${PROFILE_FREE[$name]} of ${PROFILE_TOTAL[$name]} free)"
    done
}

# Ends with 6 where MIG mode is on.
mig::refuse_on() {
    require "the MIG mode" setting::told "$GPU_MIG_CURRENT"
    [[ $CURRENT != Enabled ]] ||
        die "$EXIT_BUSY" "MIG mode is on; switch it off: sudo ./gpu-configs/disable_mig.sh"
}

# A question: fills INSTANCES with one line `ID PROFILE START:SIZE` a GPU instance, and IDS; none where MIG
# mode is off.
mig::read_instances() {
    local listing
    INSTANCES=()
    IDS=""
    setting::told "$GPU_MIG_CURRENT" || return
    [[ $CURRENT == Enabled ]] || return 0
    listing=$(gpu::ask mig -lgi) || true
    mapfile -t INSTANCES < <(awk -v gpu="$GPU_INDEX" '
        $1 == "|" && $2 == gpu && $3 == "MIG" { print $6, $4, $7 }' <<<"$listing")
    IDS=$(join "${INSTANCES[@]%% *}")
    # the header alone: other GPUs have instances
    [[ -n $IDS || $listing == *"| GPU instances"* && $listing != *"Failed to"* ||
        $listing == *"No GPU instances found"* || $listing == *"No MIG-enabled devices"* ]] ||
        not_told "$listing"
}

mig::require_instances() { require "the GPU instances of $(gpu::title)" mig::read_instances; }

# mig::subtract IDS IDS: those of the first list that are not in the second.
mig::subtract() {
    local id rest=""
    for id in ${1//,/ }; do
        [[ ,$2, == *",$id,"* ]] || rest+=",$id"
    done
    printf '%s' "${rest#,}"
}

mig::intersect() { mig::subtract "$1" "$(mig::subtract "$1" "$2")"; }

# Loads the state of setup_mig.sh and sets OURS to those of the instances there that it claims. A run that
# was killed before it saved their ids has still said which were there before. No instance outlives a restart of
# the machine (NVIDIA's MIG user guide): under the ids that were saved before it others may be there.
mig::find_own() {
    mig::require_instances
    OURS=""
    state::load mig && state::is_of_this_boot || return 0
    OURS=$(mig::subtract "$IDS" "${STATE[instances_before]:-}")
    [[ -z ${STATE[gpu_instances]:-} ]] || OURS=$(mig::intersect "$IDS" "${STATE[gpu_instances]}")
}

# A question: fills MIG_DEVICES with `UUID PROFILE` for each MIG device of the chosen GPU.
mig::find_devices() {
    local listing
    MIG_DEVICES=()
    listing=$(gpu::ask -L) || true
    [[ $listing == *"(UUID: $GPU_UUID)"* ]] || not_told "$listing" || return
    mapfile -t MIG_DEVICES < <(awk -v gpu="$GPU_UUID" '
        /^[^ ]/ { here = index($0, gpu) > 0 }
        here && $1 == "MIG" { sub(/\)$/, "", $NF); print $NF, $2 }' <<<"$listing")
}

# mig::find_holders IDS: a question: fills HOLDERS with the processes on these GPU instances, by the process
# table, the only listing that names the instance.
mig::find_holders() {
    local table gi pid name
    HOLDERS=()
    [[ -n $1 ]] || return 0
    table=$(gpu::ask -i "$GPU_UUID") || true
    [[ $table == *"| Processes:"* ]] || not_told "$table" || return
    while read -r gi pid name; do
        [[ ,$1, != *",$gi,"* ]] ||
            HOLDERS+=("pid $pid (user $(process::owner "$pid")): $(printable "$name") on GPU instance $gi")
    done < <(awk -v gpu="$GPU_INDEX" '
        $1 == "|" && $2 == gpu && $3 ~ /^[0-9]+$/ && $5 ~ /^[0-9]+$/ && $6 ~ /^[CGM+]+$/ {
            print $3, $5, $7 }' <<<"$table")
}

# mig::destroy IDS: compute instances first; ends the script where an instance stays.
mig::destroy() {
    local left said
    [[ -n $1 ]] || return 0
    run card::change nvidia-smi mig -i "$GPU_UUID" -dci -gi "$1"
    said=${RUN_OUTPUT:-}
    run card::change nvidia-smi mig -i "$GPU_UUID" -dgi -gi "$1"
    ((!DRY_RUN)) || return 0
    # else it is its own compute instance that the second finds a GPU instance in use by
    [[ $said == *"Successfully destroyed"* || $said == *"Not Found"* ]] || RUN_OUTPUT=$said
    mig::require_instances
    left=$(mig::intersect "$1" "$IDS")
    [[ -z $left ]] || card::failed "the GPU instances $left could not be destroyed"
}
