# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# Questions to nvidia-smi about one GPU, and the two settings that more than one script changes.
#
# nvidia-smi ends with 14 and a warning where a GPU's infoROM is damaged, and prints an error line in
# place of a GPU that is lost, while what it says of the others is right: so lines are read first, and
# its exit status decides only what an empty answer means.

# name last: it is the only field that could hold a comma
GPU_FIELDS="index uuid compute_mode mig.mode.current mig.mode.pending compute_cap name"
# Fields that an older nvidia-smi may not know; each is then [N/A].
readonly GPU_LATER_FIELDS="mig.mode.current mig.mode.pending compute_cap"

# A driver that hangs is one that could not be asked.
gpu::ask() { timeout -k 5 60 nvidia-smi "$@" 2>&1; }

# gpu::query [-i GPU]: fills QUERY_ROWS, one line a GPU, QUERY_REST, what else was said, and QUERY_STATUS.
# Index and UUID become parts of file names and of arithmetic, so a line with others is no row.
gpu::query() {
    local output line name
    QUERY_ROWS=()
    QUERY_REST=()
    QUERY_STATUS=0
    output=$(gpu::ask "$@" --query-gpu="${GPU_FIELDS// /,}" --format=csv,noheader) || QUERY_STATUS=$?
    for name in $GPU_LATER_FIELDS; do
        [[ $output == *"\"$name\" is not a valid field"* && $GPU_FIELDS == *" $name "* ]] || continue
        GPU_FIELDS=${GPU_FIELDS/ $name / }
        gpu::query "$@"
        return
    done
    while IFS= read -r line; do
        if [[ $line =~ ^[0-9]{1,4},\ GPU-[0-9A-Za-z-]+, ]]; then
            QUERY_ROWS+=("$line")
        elif [[ -n ${line// /} ]]; then
            QUERY_REST+=("$(printable "$line")")
        fi
    done <<<"$output"
}

# Fills GPU_LINES, one line a GPU; ends with 3 where there is no driver or no GPU. What else nvidia-smi
# says, of a GPU that is lost or damaged, is passed on.
gpu::list() {
    local line uuid
    local -a rest
    command -v nvidia-smi >/dev/null ||
        die "$EXIT_NO_GPU" "nvidia-smi was not found; install the NVIDIA driver"
    gpu::query
    GPU_LINES=("${QUERY_ROWS[@]}")
    rest=("${QUERY_REST[@]}")
    if ((${#GPU_LINES[@]} == 0)); then
        # one GPU that is lost can make the question to all fail
        for uuid in $({ gpu::ask -L || true; } | sed -nE 's/^GPU [0-9]+: .*\(UUID: (GPU-[0-9A-Za-z-]+)\)$/\1/p'); do
            gpu::query -i "$uuid"
            GPU_LINES+=("${QUERY_ROWS[@]}")
        done
    fi
    ((${#GPU_LINES[@]} > 0)) || die "$EXIT_NO_GPU" \
        "nvidia-smi names no GPU that can be used (it ended with $QUERY_STATUS): ${rest[0]:-nothing}"
    for line in "${rest[@]}"; do warn "nvidia-smi says: $line"; done
}

# gpu::read_line ROW: sets GPU_INDEX, GPU_UUID, ... of a row of gpu::query.
gpu::read_line() {
    local name fields=$1
    local -A values=([mig.mode.current]="[N/A]" [mig.mode.pending]="[N/A]" [compute_cap]="[N/A]")
    for name in ${GPU_FIELDS% name}; do
        values[$name]=${fields%%, *}
        fields=${fields#*, }
    done
    GPU_INDEX=${values[index]}
    GPU_UUID=${values[uuid]}
    GPU_COMPUTE_MODE=${values[compute_mode]}
    GPU_MIG_CURRENT=${values[mig.mode.current]}
    GPU_MIG_PENDING=${values[mig.mode.pending]}
    GPU_COMPUTE_CAPABILITY=${values[compute_cap]}
    GPU_NAME=$(printable "$fields")
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
    gpu::query -i "$GPU_UUID"
    ((${#QUERY_ROWS[@]} == 1)) ||
        die "$EXIT_NO_GPU" "GPU $GPU_UUID no longer answers: ${QUERY_REST[0]:-nothing was said}"
    gpu::read_line "${QUERY_ROWS[0]}"
}

gpu::title() { printf 'GPU %s (%s, %s)' "$GPU_INDEX" "$GPU_NAME" "$GPU_UUID"; }

# Fills HOLDERS with one readable line a process on the GPU; MPS servers that idle count too. False, with
# NOT_TOLD, where nvidia-smi could not be asked for all of them.
gpu::find_holders() {
    local output line status=0
    HOLDERS=()
    NOT_TOLD=""
    output=$(gpu::ask -i "$GPU_UUID" --query-compute-apps=pid,used_memory,process_name \
        --format=csv,noheader) || status=$?
    while IFS= read -r line; do
        if [[ $line =~ ^([0-9]+),\ ([^,]*),\ (.*)$ ]]; then
            line="pid ${BASH_REMATCH[1]} (user $(gpu::owner "${BASH_REMATCH[1]}")): ${BASH_REMATCH[3]}, ${BASH_REMATCH[2]}"
            HOLDERS+=("$(printable "$line")")
        elif [[ -n $line && ${line,,} != *"inforom is corrupted"* && $line != "No running processes found" ]]; then
            NOT_TOLD=${NOT_TOLD:-$(printable "$line")}
        fi
    done <<<"$output"
    ((status == 0 || status == 14)) || NOT_TOLD=${NOT_TOLD:-nvidia-smi ended with $status}
    [[ -z $NOT_TOLD ]]
}

# gpu::owner PID: an account's name may hold blanks.
gpu::owner() {
    local name
    name=$(ps -o user:64= -p "$1" 2>/dev/null) || name=unknown
    printf '%s' "${name%"${name##*[! ]}"}"
}

# The HOLDERS, on stderr.
gpu::print_holders() {
    ((${#HOLDERS[@]} > 0)) || return 0
    log "On $(gpu::title):"
    printf '  %s\n' "${HOLDERS[@]}" >&2
}

# --- compute mode and time slice --------------------------------------------------------------------

# setting::read compute-mode|time-slice: sets CURRENT, Default among others; nothing where the GPU has no
# such setting. False, with NOT_TOLD, where nvidia-smi could not be asked.
setting::read() {
    local output status=0
    if [[ $1 == compute-mode ]]; then
        gpu::refresh
        CURRENT=$GPU_COMPUTE_MODE
        return 0
    fi
    output=$(gpu::ask compute-policy -l) || status=$?
    CURRENT=$(awk -v gpu="$GPU_INDEX" '$1 == "|" && $2 == gpu && $3 == "Timeslice" { print $4; exit }' <<<"$output")
    # 2 and 3: no such command in this nvidia-smi, no such setting on this GPU
    [[ -z $CURRENT && $status != [23] && $output != *"compute policies"* ]] || return 0
    NOT_TOLD=$(printable "${output%%$'\n'*}")
    NOT_TOLD=${NOT_TOLD:-nvidia-smi ended with $status}
    return 1
}

# setting::require_read NAME: the same, and ends the script where it is not known.
setting::require_read() {
    setting::read "$1" || die "$EXIT_FAILED" "the ${1/-/ } could not be asked: $NOT_TOLD"
}

# setting::change NAME VALUE: asks nvidia-smi for it, unless it is so, and reads it back.
setting::change() {
    local -rA slices=([Default]=0 [Short]=1 [Medium]=2 [Long]=3)
    setting::require_read "$1"
    [[ $CURRENT != "$2" ]] || return 0
    if [[ $1 == compute-mode ]]; then
        # it reports `Exclusive_Process` and takes `EXCLUSIVE_PROCESS`
        run --card nvidia-smi -i "$GPU_UUID" -c "${2^^}"
    else
        run --card nvidia-smi compute-policy -i "$GPU_UUID" --set-timeslice "${slices[$2]}"
    fi
    ((DRY_RUN)) && return 0
    setting::require_read "$1"
    [[ $CURRENT == "$2" ]] || card::failed "the ${1/-/ } is $CURRENT, not $2"
}

# setting::set NAME VALUE: changes it and saves what it was before any of our changes. A saved value
# counts only while the setting still is what we set: a driver reload resets it, and then the present one
# is the previous one.
setting::set() {
    local previous
    setting::require_read "$1"
    [[ $CURRENT != "$2" ]] || return 0
    previous=$CURRENT
    if state::load "$1" && [[ ${STATE[set]:-} == "$CURRENT" ]]; then
        previous=${STATE[previous]:-$CURRENT}
    fi
    state::keep "$1"
    undo::push setting::change "$1" "$CURRENT"
    [[ $2 == "$previous" ]] || state::save "$1" "previous=$previous" "set=$2"
    setting::change "$1" "$2"
    [[ $2 != "$previous" ]] || state::remove "$1"
}

# setting::check_saved NAME: ends the script where a saved setting cannot be put back; sets IS_OURS, whether
# there is one that still is what was set here.
setting::check_saved() {
    IS_OURS=0
    state::load "$1" || return 0
    [[ ${STATE[previous]:-} =~ ^(Default|Short|Medium|Long|Prohibited|Exclusive_(Process|Thread))$ ]] ||
        die "$EXIT_FAILED" "$(state::file "$1") is damaged (previous=${STATE[previous]:-})"
    setting::require_read "$1"
    [[ $CURRENT != "${STATE[set]:-}" || $CURRENT == "${STATE[previous]}" ]] || IS_OURS=1
    card::require "changing the ${1/-/ }"
}

# setting::put_back NAME: what was before setting::set, if that is still in force.
setting::put_back() {
    setting::check_saved "$1"
    ((${#STATE[@]})) || return 0
    if ((IS_OURS)); then
        setting::change "$1" "${STATE[previous]}"
    elif [[ $CURRENT != "${STATE[previous]}" ]]; then
        warn "the ${1/-/ } is $CURRENT, not the ${STATE[set]:-?} that was set up; left as it is"
    fi
    state::remove "$1"
}
