# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# Questions to nvidia-smi about one GPU, and the settings of it that are changed here.
#
# nvidia-smi ends with 14 and a warning where a GPU's infoROM is damaged, and prints an error line in
# place of a GPU that is lost, while what it says of the others is right: so lines are read first, and
# its exit status decides only what an empty answer means.

# Index and UUID become parts of file names and of arithmetic, so a line with others is no row. The name is
# last: it is the only field that could hold a comma.
GPU_FIELDS=index,uuid,compute_mode,mig.mode.current,mig.mode.pending,compute_cap,name
readonly GPU_ROW='^[0-9]{1,4}, GPU-[0-9A-Za-z-]+(, [^,]*){5}'

# A driver that hangs is one that could not be asked. In the foreground, so that Ctrl-C reaches it.
gpu::ask() { timeout --foreground -k 5 60 nvidia-smi "$@" 2>&1; }

# gpu::query [-i GPU]: fills QUERY_ROWS, one line a GPU, QUERY_REST, what else was said, and QUERY_STATUS.
gpu::query() {
    local output line field
    QUERY_ROWS=()
    QUERY_REST=()
    QUERY_STATUS=0
    output=$(gpu::ask "$@" --query-gpu="$GPU_FIELDS" --format=csv,noheader) || QUERY_STATUS=$?
    # An older nvidia-smi knows fewer fields: in place of those the UUID is asked for, and read as [N/A].
    for field in mig.mode.current mig.mode.pending compute_cap; do
        [[ $output == *"\"$field\" is not a valid field"* && $GPU_FIELDS == *",$field,"* ]] || continue
        GPU_FIELDS=${GPU_FIELDS/,$field,/,uuid,}
        gpu::query "$@"
        return
    done
    while IFS= read -r line; do
        if [[ $line =~ $GPU_ROW ]]; then
            QUERY_ROWS+=("$(printable "$line")")
        elif [[ -n ${line// /} ]]; then
            QUERY_REST+=("$(printable "$line")")
        fi
    done <<<"$output"
}

# Fills GPU_LINES, one line a GPU, of --gpu or all, and GPU_COUNT; ends with 3 where there is no driver or no
# such GPU. What else nvidia-smi says, of a GPU that is lost or damaged, is passed on.
gpu::list() {
    local line uuid
    local -r names='s/^GPU [0-9]+: .*\(UUID: (GPU-[0-9A-Za-z-]+)\)$/\1/p'
    local -a rows rest titles=()
    command -v nvidia-smi >/dev/null || die "$EXIT_NO_GPU" "nvidia-smi was not found; install the NVIDIA driver"
    # without it every table would read as an empty one
    command -v awk >/dev/null || die "$EXIT_FAILED" "awk was not found; install gawk or mawk"
    gpu::query
    rows=("${QUERY_ROWS[@]}")
    rest=("${QUERY_REST[@]}")
    if ((${#rows[@]} == 0)); then
        # one GPU that is lost can make the question to all fail
        for uuid in $({ gpu::ask -L || true; } | sed -nE "$names"); do
            gpu::query -i "$uuid"
            rows+=("${QUERY_ROWS[@]}")
        done
    fi
    GPU_COUNT=${#rows[@]}
    ((GPU_COUNT > 0)) || die "$EXIT_NO_GPU" \
        "nvidia-smi names no GPU that can be used (it ended with $QUERY_STATUS): ${rest[0]:-nothing}"
    for line in "${rest[@]}"; do warn "nvidia-smi says: $line"; done
    GPU_LINES=()
    for line in "${rows[@]}"; do
        gpu::read_line "$line"
        titles+=("  $(gpu::title)")
        [[ -n $GPU_SELECTOR && $GPU_SELECTOR != "$GPU_INDEX" && $GPU_SELECTOR != "$GPU_UUID" ]] ||
            GPU_LINES+=("$line")
    done
    ((${#GPU_LINES[@]} == 0)) || return 0
    log "$(printf '%s\n' "${titles[@]}")"
    die "$EXIT_NO_GPU" "there is no GPU '$(printable "$GPU_SELECTOR")'; those above are there"
}

# gpu::read_line ROW: sets GPU_INDEX, GPU_UUID, ... of a row of gpu::query.
gpu::read_line() {
    local name
    IFS=, read -r GPU_INDEX GPU_UUID GPU_COMPUTE_MODE GPU_MIG_CURRENT GPU_MIG_PENDING \
        GPU_COMPUTE_CAPABILITY _ <<<"${1//, /,}"
    GPU_NAME=${1#*, *, *, *, *, *, }
    for name in GPU_MIG_CURRENT GPU_MIG_PENDING GPU_COMPUTE_CAPABILITY; do
        [[ ${!name} != "$GPU_UUID" ]] || printf -v "$name" '[N/A]'
    done
    GPU_MIG_MODE=$GPU_MIG_CURRENT
    [[ $GPU_MIG_PENDING == "$GPU_MIG_CURRENT" ]] || GPU_MIG_MODE+=" (pending: $GPU_MIG_PENDING)"
}

# Chooses the GPU of --gpu, or the first, and fills the GPU_* variables: the beginning of every script that
# changes something.
gpu::select() {
    trap 'exit 141' PIPE
    if ((!DRY_RUN)); then
        transaction::take_turn mps "$USER_STATE" 077
        ((EUID != 0)) || [[ $ROOT_STATE -ef $USER_STATE ]] || transaction::take_turn mig "$ROOT_STATE" 022
    fi
    gpu::list
    gpu::read_line "${GPU_LINES[0]}"
    ((${#GPU_LINES[@]} == 1)) || log "Taking GPU $GPU_INDEX of $GPU_COUNT; --gpu chooses another."
}

gpu::title() { printf 'GPU %s (%s, %s)' "$GPU_INDEX" "$GPU_NAME" "$GPU_UUID"; }

# A question: fills HOLDERS with one readable line a process on the GPU; MPS servers that idle count too.
gpu::find_holders() {
    local output line said="" status=0
    HOLDERS=()
    output=$(gpu::ask -i "$GPU_UUID" --query-compute-apps=pid,used_memory,process_name \
        --format=csv,noheader) || status=$?
    while IFS= read -r line; do
        if [[ $line =~ ^([0-9]+),\ ([^,]*),\ (.*)$ ]]; then
            line="pid ${BASH_REMATCH[1]} (user $(process::owner "${BASH_REMATCH[1]}")): ${BASH_REMATCH[3]}"
            HOLDERS+=("$(printable "$line, ${BASH_REMATCH[2]}")")
        elif [[ ${line,,} != *"inforom is corrupted"* && $line != "No running processes found" ]]; then
            said=${said:-$line}
        fi
    done <<<"$output"
    [[ -z $said && $status == @(0|14) ]] || not_told "${said:-nvidia-smi ended with $status}"
}

# Prints the HOLDERS on stderr; false where there are none.
gpu::print_holders() {
    ((${#HOLDERS[@]} > 0)) || return 1
    log "On $(gpu::title):"
    log "$(printf '  %s\n' "${HOLDERS[@]}")"
}

# process::owner PID: an account's name may hold blanks.
process::owner() {
    local name
    name=$(ps -o user:64= -p "$1" 2>/dev/null) || name=unknown
    printable "${name%"${name##*[! ]}"}"
}

# process::runs PID PROGRAM: whether a process runs that program, as far as it may be looked at. What a
# process calls itself is anybody's choice.
process::runs() {
    local program
    program=$(readlink -- "/proc/$1/exe" 2>/dev/null) || return 0
    program=${program% (deleted)}
    [[ ${program##*/} == "$2" ]]
}

# --- settings: compute-mode, time-slice and MIG-mode ------------------------------------------------

# What can be put back.
readonly SETTING='^(Default|Short|Medium|Long|Prohibited|Exclusive_(Process|Thread))$'

# setting::read NAME: a question: sets CURRENT, which is nothing where the GPU has no such setting. The
# GPU_* variables are read anew for those that are among them: in brackets stands why one is not told.
setting::read() {
    local output status=0
    if [[ $1 == time-slice ]]; then
        output=$(gpu::ask compute-policy -l) || status=$?
        CURRENT=$(awk -v gpu="$GPU_INDEX" '
            $1 == "|" && $2 == gpu && $3 == "Timeslice" { print $4; exit }' <<<"$output")
        # 2 and 3: no such command in this nvidia-smi, no such setting on this GPU
        [[ -n $CURRENT || $status == [23] || $output == *"compute policies"* && $output != *"Failed to"* ]] ||
            not_told "${output:-nvidia-smi ended with $status}"
        return
    fi
    gpu::query -i "$GPU_UUID"
    ((${#QUERY_ROWS[@]} == 1)) || die "$EXIT_NO_GPU" "GPU $GPU_UUID no longer answers: ${QUERY_REST[0]:-}"
    gpu::read_line "${QUERY_ROWS[0]}"
    if [[ $1 == MIG-mode ]]; then setting::told "$GPU_MIG_MODE"; else setting::told "$GPU_COMPUTE_MODE"; fi
}

# setting::told VALUE: a question that nvidia-smi has answered: sets CURRENT to the value, or to nothing where
# the GPU has no such setting.
setting::told() {
    CURRENT=$1
    case $1 in
        "[N/A]" | "[Not Supported]") CURRENT="" ;;
        \[*) not_told "$1" ;;
    esac
}

# setting::change NAME VALUE: asks nvidia-smi for it, unless it is so, and reads it back.
setting::change() {
    local -rA number=([Default]=0 [Short]=1 [Medium]=2 [Long]=3 [Disabled]=0 [Enabled]=1)
    require "the ${1/-/ }" setting::read "$1"
    [[ $CURRENT != "$2" ]] || return 0
    case $1 in
        compute-mode) run card::change nvidia-smi -i "$GPU_UUID" -c "${2^^}" ;; # reported in small letters
        time-slice) run card::change nvidia-smi compute-policy -i "$GPU_UUID" --set-timeslice "${number[$2]}" ;;
        MIG-mode) run card::change nvidia-smi -i "$GPU_UUID" -mig "${number[$2]}" ;;
    esac
    ((!DRY_RUN)) || return 0
    require "the ${1/-/ }" setting::read "$1"
    [[ $CURRENT == "$2" ]] || card::failed "the ${1/-/ } is $CURRENT, not $2"
}

# setting::set NAME VALUE: changes it and saves what it was before any of our changes. A saved value
# counts only while the setting still is what we set: a driver reload resets it, and then the present one
# is the previous one.
setting::set() {
    local previous
    require "the ${1/-/ }" setting::read "$1"
    [[ -n $CURRENT ]] || die "$EXIT_UNSUPPORTED" "$(gpu::title) has no ${1/-/ } setting"
    [[ $CURRENT != "$2" ]] || return 0
    previous=$CURRENT
    ! state::load "$1" || ! setting::is_ours || previous=${STATE[previous]:-$CURRENT}
    [[ $previous =~ $SETTING ]] ||
        die "$EXIT_UNSUPPORTED" "the ${1/-/ } is $(printable "$previous"), which could not be put back; left as it is"
    if [[ $2 == "$previous" ]]; then
        setting::put_back "$1"
        return
    fi
    state::save "$1" "previous=$previous" "set=$2" "from=$CURRENT" "boot=$BOOT"
    undo::push setting::change "$1" "$CURRENT"
    setting::change "$1" "$2"
}

# Whether what is CURRENT was set by us: what was saved last or, where that was killed before it changed anything,
# what it found. Neither outlives a restart of the machine: then somebody else has set it.
setting::is_ours() {
    state::is_of_this_boot && [[ $CURRENT == "${STATE[set]:-}" || $CURRENT == "${STATE[from]:-}" ]]
}

# setting::check_saved NAME: false where nothing is saved; ends the script where it cannot be put back.
setting::check_saved() {
    state::load "$1" || return 1
    [[ ${STATE[previous]:-} =~ $SETTING ]] ||
        state::damaged "$1" "previous=${STATE[previous]:-}"
    require "the ${1/-/ }" setting::read "$1"
    card::require "changing the ${1/-/ }"
}

# setting::put_back NAME: what was before setting::set, if what that set is still in force.
setting::put_back() {
    local since=""
    setting::check_saved "$1" || return 0
    if setting::is_ours; then
        setting::change "$1" "${STATE[previous]}"
    elif [[ $CURRENT != "${STATE[previous]}" ]]; then
        state::is_of_this_boot || since=" before a restart of the machine"
        warn "the ${1/-/ } is $CURRENT, not the ${STATE[set]:-?} that was set up$since; left as it is"
    fi
    state::remove "$1"
}
