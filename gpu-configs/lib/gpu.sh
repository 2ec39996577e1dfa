# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# Questions to nvidia-smi about one GPU, and the two settings that more than one script changes.

# name last: it is the only field that could hold a comma
readonly GPU_FIELDS=index,uuid,compute_mode,mig.mode.current,mig.mode.pending,compute_cap,name

# Fills GPU_LINES, one line a GPU; ends with 3 where there is no driver or no GPU. Index and UUID
# become parts of file names and of arithmetic, so that a line with others is none.
gpu::list() {
    local output line status=0
    local -a lines
    command -v nvidia-smi >/dev/null ||
        die "$EXIT_NO_GPU" "nvidia-smi was not found; install the NVIDIA driver"
    output=$(nvidia-smi "--query-gpu=$GPU_FIELDS" --format=csv,noheader 2>&1) || status=$?
    ((status == 0)) ||
        die "$EXIT_NO_GPU" "no usable GPU (nvidia-smi ended with $status): ${output%%$'\n'*}"
    mapfile -t lines <<<"$output"
    GPU_LINES=()
    for line in "${lines[@]}"; do
        gpu::read_line "$line"
        [[ ! $GPU_INDEX =~ ^[0-9]{1,4}$ || ! $GPU_UUID =~ ^GPU-[0-9A-Za-z-]+$ ]] || GPU_LINES+=("$line")
    done
    ((${#GPU_LINES[@]} > 0)) ||
        die "$EXIT_NO_GPU" "nvidia-smi names no GPU that can be used: $(printable "${lines[0]}")"
}

gpu::read_line() {
    local field
    IFS=, read -r GPU_INDEX GPU_UUID GPU_COMPUTE_MODE GPU_MIG_CURRENT GPU_MIG_PENDING \
        GPU_COMPUTE_CAPABILITY GPU_NAME <<<"$1"
    for field in UUID COMPUTE_MODE MIG_CURRENT MIG_PENDING COMPUTE_CAPABILITY NAME; do
        field=GPU_$field
        printf -v "$field" '%s' "${!field# }"
    done
    GPU_NAME=$(printable "$GPU_NAME")
}

# Chooses the GPU of --gpu, or the first, and fills the GPU_* variables.
gpu::select() {
    local line
    gpu::list
    for line in "${GPU_LINES[@]}"; do
        gpu::read_line "$line"
        if [[ -z $GPU_SELECTOR || $GPU_SELECTOR == "$GPU_INDEX" || $GPU_SELECTOR == "$GPU_UUID" ]]; then
            if [[ -z $GPU_SELECTOR ]] && ((${#GPU_LINES[@]} > 1)); then
                log "Taking GPU $GPU_INDEX of ${#GPU_LINES[@]}; --gpu chooses another."
            fi
            GPU_SELECTOR=$GPU_UUID
            return 0
        fi
    done
    for line in "${GPU_LINES[@]}"; do
        gpu::read_line "$line"
        log "  GPU $GPU_INDEX: $GPU_NAME ($GPU_UUID)"
    done
    die "$EXIT_NO_GPU" "there is no GPU '$GPU_SELECTOR'; those above are there"
}

# Reads the settings of the chosen GPU anew.
gpu::refresh() {
    local line
    line=$(nvidia-smi -i "$GPU_UUID" "--query-gpu=$GPU_FIELDS" --format=csv,noheader 2>&1) ||
        die "$EXIT_NO_GPU" "GPU $GPU_UUID no longer answers: $line"
    gpu::read_line "$line"
}

gpu::title() { printf 'GPU %s (%s, %s)' "$GPU_INDEX" "$GPU_NAME" "$GPU_UUID"; }

# Fills HOLDERS with one readable line a process on the GPU; MPS servers that idle count too.
gpu::find_holders() {
    local output pid memory name owner
    HOLDERS=()
    output=$(nvidia-smi -i "$GPU_UUID" --query-compute-apps=pid,used_memory,process_name \
        --format=csv,noheader 2>/dev/null) || return 0
    while IFS=, read -r pid memory name; do
        [[ $pid =~ ^[0-9]+$ ]] || continue
        owner=$(gpu::owner "$pid")
        HOLDERS+=("$(printable "pid $pid (user ${owner:-unknown}): ${name# }, ${memory# }")")
    done <<<"$output"
}

gpu::owner() {
    command -v ps >/dev/null || return 0
    { ps -o user:32= -p "$1" || true; } | tr -d ' '
}

# The processes on the GPU, on stderr.
gpu::print_holders() {
    gpu::find_holders
    ((${#HOLDERS[@]} > 0)) || return 0
    log "On $(gpu::title):"
    printf '  %s\n' "${HOLDERS[@]}" >&2
}

# gpu::timeslice: Default, Short, Medium or Long; nothing where the GPU has no such setting.
gpu::timeslice() {
    local output
    output=$(nvidia-smi compute-policy -l 2>/dev/null) || return 0
    awk -v gpu="$GPU_INDEX" '$1 == "|" && $2 == gpu && $3 == "Timeslice" { print $4; exit }' <<<"$output"
}

# gpu::put_back_timeslice NAME
gpu::put_back_timeslice() {
    [[ $(gpu::timeslice) != "$1" ]] || return 0
    gpu::change_timeslice "$1"
    [[ $(gpu::timeslice) == "$1" ]] || card::failed "the time slice could not be set back to $1"
}

gpu::change_timeslice() {
    local -rA numbers=([Default]=0 [Short]=1 [Medium]=2 [Long]=3)
    run --card nvidia-smi compute-policy -i "$GPU_UUID" --set-timeslice "${numbers[$1]}"
}

# gpu::put_back_compute_mode NAME
gpu::put_back_compute_mode() {
    gpu::refresh
    [[ $GPU_COMPUTE_MODE != "$1" ]] || return 0
    gpu::change_compute_mode "$1"
    gpu::refresh
    [[ $GPU_COMPUTE_MODE == "$1" ]] || card::failed "the compute mode could not be set back to $1"
}

# nvidia-smi reports `Exclusive_Process` and takes `EXCLUSIVE_PROCESS`.
gpu::change_compute_mode() { run --card nvidia-smi -i "$GPU_UUID" -c "${1^^}"; }
