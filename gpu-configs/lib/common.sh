# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# What every mode script shares: exit codes, messages, the common flags, the one way to change
# anything (`run`), putting back after a failure, the invoking user, and saved state.
#
# A script here is a transaction. It checks, saves the previous state, changes, asks the driver or the
# daemon whether the change took, and prints what is in force. Until it has ended well, a failure or a
# signal puts back what it changed. The undo scripts only go forward: stopped half-way, their state file
# is still there and the next run finishes the work.

set -Eeuo pipefail
export LC_ALL=C

readonly EXIT_FAILED=1
readonly EXIT_USAGE=2
readonly EXIT_NO_GPU=3
readonly EXIT_UNSUPPORTED=4
readonly EXIT_PERMISSION=5
readonly EXIT_BUSY=6

# How long to wait for a daemon to answer, or for its last clients to leave.
WAIT_SECONDS=${GPU_SHARING_WAIT_SECONDS:-10}
[[ $WAIT_SECONDS =~ ^(0|[1-9][0-9]{0,4})$ ]] || WAIT_SECONDS=10
readonly WAIT_SECONDS

DRY_RUN=0
GPU_SELECTOR=""
THIS_COMMAND=("./gpu-configs/${0##*/}" "$@")
DIED_OF="" # the sentence that `die` ended with

# --- messages -------------------------------------------------------------------------------------

# A terminal that was closed takes no words: that must not end the work, least of all a putting back.
log() { printf '%s\n' "$*" >&2 2>/dev/null || true; }
warn() { log "warning: $*"; }

# die CODE TEXT...
die() {
    DIED_OF=${*:2}
    printf 'error: %s\n' "${*:2}" >&2
    exit "$1"
}

# The text of somebody else, such as a process's name, without what would steer the terminal.
printable() { printf '%s' "${1//[[:cntrl:]]/?}"; }

# The words as they could be typed again. Only what needs quoting is quoted.
quoted() {
    local word text=""
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:,=@%+-]+$ ]]; then
            text+=" $word"
        else
            text+=" '${word//\'/\'\\\'\'}'"
        fi
    done
    printf '%s' "${text# }"
}

# --- time -----------------------------------------------------------------------------------------

# clock::read: sets NOW to seconds that only ever go on. bash's own SECONDS follow the wall clock, so
# a clock that is set meanwhile would end a wait at once, or never.
clock::read() {
    local uptime
    read -r uptime _ </proc/uptime
    NOW=${uptime%.*}
}

# clock::is_past SECONDS: whether NOW, read anew, has come to that.
clock::is_past() {
    clock::read
    ((NOW >= $1))
}

# --- flags ----------------------------------------------------------------------------------------

cli::usage_error() {
    printf 'error: %s\n' "$*" >&2
    printf "Try '%s --help'.\n" "${THIS_COMMAND[0]}" >&2
    exit "$EXIT_USAGE"
}

# Sets ARGUMENTS to the words given, with --name=value as two words.
cli::split() {
    local word
    ARGUMENTS=()
    for word in "$@"; do
        if [[ $word == --*=* ]]; then
            ARGUMENTS+=("${word%%=*}" "${word#*=}")
        else
            ARGUMENTS+=("$word")
        fi
    done
}

# Sets VALUE to the word after the flag $1.
cli::value() {
    (($# >= 2)) && [[ $2 != --* ]] || cli::usage_error "$1 needs a value"
    VALUE=$2
}

# Takes a flag that every script knows; sets CONSUMED to the number of words it used.
cli::common_flag() {
    CONSUMED=1
    case $1 in
        --dry-run) DRY_RUN=1 ;;
        --gpu)
            cli::value "$@"
            [[ -n $VALUE ]] || cli::usage_error "--gpu needs an index or a UUID"
            GPU_SELECTOR=$VALUE
            CONSUMED=2
            ;;
        --help | -h)
            usage
            exit 0
            ;;
        -*) cli::usage_error "unknown option: $1" ;;
        *) cli::usage_error "unexpected argument: $1" ;;
    esac
}

# For a script that takes nothing but the common flags.
cli::parse_common() {
    cli::split "$@"
    set -- "${ARGUMENTS[@]}"
    while (($#)); do
        cli::common_flag "$@"
        shift "$CONSUMED"
    done
}

# --- the invoking user ------------------------------------------------------------------------------

# Under sudo the user who typed the command owns the daemon, its folders and the state files. sudo
# drops the caller's variables, so the ones that matter here are read from sudo's own environment.
user::resolve() {
    local entry name
    if ((EUID == 0)); then
        for name in GPU_SETTINGS_LOCKED GPU_SHARING_STATE_DIR XDG_STATE_HOME; do
            [[ -n ${!name:-} ]] || user::inherit_from_sudo "$name"
        done
    fi
    INVOKER_UID=$EUID
    INVOKER_GID=$(id -g)
    INVOKER_NAME=$(id -un 2>/dev/null || printf '%s' "$EUID")
    INVOKER_HOME=${HOME:-/nonexistent}
    if ((EUID == 0)) && [[ ${SUDO_UID:-0} =~ ^[0-9]+$ ]] && ((${SUDO_UID:-0} != 0)); then
        entry=$(getent passwd "$SUDO_UID") || die "$EXIT_FAILED" "no account has the user id $SUDO_UID"
        IFS=: read -r INVOKER_NAME _ INVOKER_UID INVOKER_GID _ INVOKER_HOME _ <<<"$entry"
    fi
    STATE_DIRECTORY=${GPU_SHARING_STATE_DIR:-${XDG_STATE_HOME:-$INVOKER_HOME/.local/state}/gpu-sharing-bench}
    [[ $STATE_DIRECTORY == /* ]] || STATE_DIRECTORY=$PWD/$STATE_DIRECTORY
    [[ $STATE_DIRECTORY != *[[:cntrl:]]* ]] || die "$EXIT_USAGE" "the state folder's name holds a" \
        "line break or the like; set GPU_SHARING_STATE_DIR to another"
    readonly INVOKER_UID INVOKER_GID INVOKER_NAME INVOKER_HOME STATE_DIRECTORY
}

user::inherit_from_sudo() {
    local parent line
    parent=$(cat "/proc/$PPID/comm" 2>/dev/null) || return 0
    [[ $parent == sudo ]] || return 0
    while IFS= read -r -d '' line; do
        [[ $line != "$1="* ]] || printf -v "$1" '%s' "${line#*=}"
    done <"/proc/$PPID/environ"
}

# Runs a program as the invoking user, so that root never writes into a folder that a user owns.
as_user() {
    if ((INVOKER_UID == EUID)); then
        "$@"
    else
        setpriv --reuid="$INVOKER_UID" --regid="$INVOKER_GID" --init-groups \
            env -u SUDO_USER -u SUDO_UID -u SUDO_GID -u SUDO_COMMAND \
            HOME="$INVOKER_HOME" USER="$INVOKER_NAME" LOGNAME="$INVOKER_NAME" "$@"
    fi
}

# --- changes ----------------------------------------------------------------------------------------

# card::require WHAT: ends with 5 unless the card's settings may be changed from here.
card::require() {
    local reason=""
    if [[ ${GPU_SETTINGS_LOCKED:-0} == 1 ]]; then
        reason="$1 is refused: GPU_SETTINGS_LOCKED=1 says that others share this GPU's settings"
    elif ((EUID != 0)); then
        reason="$1 needs root: sudo $(quoted "${THIS_COMMAND[@]}")"
    fi
    [[ -n $reason ]] || return 0
    ((DRY_RUN)) || die "$EXIT_PERMISSION" "$reason"
    warn "outside of a dry run: $reason"
}

# run [--card] [--user] [--note TEXT] COMMAND...
# Every change goes through here, so that a dry run is complete: it prints and does nothing.
#   --card   a setting of the GPU: needs root, is refused where GPU_SETTINGS_LOCKED=1; what the
#            command printed is kept in RUN_OUTPUT and its exit status is not trusted (nvidia-smi
#            ends well with a change that is only pending): the caller reads the setting back
#   --user   as the invoking user
#   --note   what to show instead of the command itself
run() {
    local card=0 note="" prefix=()
    while [[ $1 == --* ]]; do
        case $1 in
            --card) card=1 ;;
            --user) prefix=(as_user) ;;
            --note)
                note=$2
                shift
                ;;
        esac
        shift
    done
    [[ -n $note ]] || note=$(quoted "$@")
    if ((DRY_RUN)); then
        printf 'would run: %s\n' "$note"
        return 0
    fi
    if ((card)); then
        card::require "changing a setting of the GPU"
        log "run: $note"
        RUN_OUTPUT=$("$@" 2>&1) || true
    else
        log "run: $note"
        "${prefix[@]}" "$@"
    fi
}

# card::failed WHAT: a setting that was read back is not what was asked for; ends with the code that
# the driver's own words call for. The words are those of NVIDIA's manuals, unverified on a card.
card::failed() {
    local -r words=${RUN_OUTPUT:-nothing was printed}
    local code=$EXIT_FAILED
    case $words in
        *[Pp]ermission*) code=$EXIT_PERMISSION ;;
        *"In use"* | *"in use"*) code=$EXIT_BUSY ;;
        *"Not Supported"* | *"not supported"*) code=$EXIT_UNSUPPORTED ;;
    esac
    ((code != EXIT_BUSY)) || gpu::print_holders
    die "$code" "$1; nvidia-smi said: $words"
}

# --- putting back -----------------------------------------------------------------------------------

UNDO=()
UNDO_FAILED=0

# undo::push COMMAND...: what puts a change back. Pushed *before* the change, because a signal can come
# between a change and the next line; so the command has to look first whether there is anything to do.
undo::push() {
    ((DRY_RUN)) || UNDO+=("$(printf '%q ' "$@")")
}

# From here on nothing is put back: the work is done, or is meant to stay as it is.
undo::forget() { UNDO=(); }

undo::on_exit() {
    local -ri status=$?
    local -i i
    trap - ERR EXIT
    trap '' INT TERM HUP # whoever is impatient shall not stop the putting back
    if ((status != 0 && ${#UNDO[@]} > 0)); then
        log "Putting back what was changed."
        for ((i = ${#UNDO[@]} - 1; i >= 0; i--)); do
            (eval "${UNDO[i]}") || UNDO_FAILED=1
        done
        if ((UNDO_FAILED)); then
            log "Not everything could be put back. See ./gpu-configs/gpu_status.sh for what is in force."
        fi
    fi
    exit "$status"
}

undo::on_unexpected() {
    local -ri status=$1
    printf 'error: %s failed with status %d (%s, line %s)\n' "$3" "$status" "${0##*/}" "$2" >&2
    exit "$EXIT_FAILED"
}

transaction::begin() {
    trap undo::on_exit EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
    trap 'undo::on_unexpected "$?" "$LINENO" "$BASH_COMMAND"' ERR
}

# --- saved state ------------------------------------------------------------------------------------

declare -A STATE=()

# state::file MODE: where the state of this mode on the chosen GPU is kept.
state::file() { printf '%s/%s-%s.state' "$STATE_DIRECTORY" "$1" "$GPU_UUID"; }

# state::load MODE: fills STATE; false where nothing is saved.
state::load() {
    local file text line
    STATE=()
    file=$(state::file "$1")
    as_user test -e "$file" -o -L "$file" || return 1
    state::require_own "$STATE_DIRECTORY/." directory
    state::require_own "$file" "regular*file"
    text=$(as_user cat -- "$file") || die "$EXIT_PERMISSION" "cannot read $file"
    while IFS= read -r line; do
        [[ ! $line =~ ^([a-z_]+)=(.*)$ ]] || STATE[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
    done <<<"$text"
    [[ ${STATE[gpu_uuid]:-} == "$GPU_UUID" ]] ||
        die "$EXIT_FAILED" "$file is damaged (no gpu_uuid of this GPU); look at it and remove it"
}

# state::require_own PATH KIND_PATTERN: ends with 5 where somebody else could have written what is there: it
# names folders that are removed and settings that are put back as root.
state::require_own() {
    local owner mode kind
    read -r owner mode kind < <(as_user stat -c '%u %a %F' -- "$1" 2>/dev/null) ||
        die "$EXIT_PERMISSION" "cannot look at $1; set GPU_SHARING_STATE_DIR to a folder of your own"
    # shellcheck disable=SC2053 # a pattern: an empty file is a kind of its own
    [[ $kind == $2 ]] || die "$EXIT_PERMISSION" \
        "$1 is a $kind, which these scripts never make; look at it and remove it"
    ((owner == INVOKER_UID || owner == 0)) ||
        die "$EXIT_PERMISSION" "$1 belongs to user $(id -un "$owner" 2>/dev/null || printf '%s' "$owner")," \
            "not to $INVOKER_NAME; remove it, or set GPU_SHARING_STATE_DIR to a folder of your own"
    (((8#$mode & 8#022) == 0)) || die "$EXIT_PERMISSION" "others may write $1; look whether it is as" \
        "you left it, then: chmod go-w $(quoted "$1")"
}

state::require_own_directory() {
    ! as_user test -d "$STATE_DIRECTORY" || state::require_own "$STATE_DIRECTORY/." directory
}

# state::needs_root MODE: whether undoing the loaded state changes a setting of the card.
state::needs_root() {
    case $1 in
        mig) return 0 ;;
        mps) [[ ${STATE[compute_mode]:-} != "${STATE[previous_compute_mode]:-}" ]] ;;
        *) [[ ${STATE[timeslice]:-} != "${STATE[previous_timeslice]:-}" ]] ;;
    esac
}

# The text of a saved state file, or nothing; for putting it back.
state::text() {
    local file
    file=$(state::file "$1")
    as_user cat -- "$file" 2>/dev/null || true
}

# state::save MODE KEY=VALUE...: replaces the file in one step, readable by its owner alone.
state::save() {
    local file
    local -r mode=$1
    shift
    file=$(state::file "$mode")
    state::require_own_directory
    # shellcheck disable=SC2016 # the inner shell expands
    run --user --note "save $file: $*" bash -c '
        umask 077
        mkdir -p -- "${1%/*}" && temporary=$(mktemp -- "$1.XXXXXX") || exit 1
        printf "%s\n" "${@:2}" >"$temporary" && sync -- "$temporary" && mv -fT -- "$temporary" "$1"
    ' save "$file" "$@" || die "$EXIT_PERMISSION" "cannot write $file as $INVOKER_NAME;" \
        "set GPU_SHARING_STATE_DIR to a folder that this user may write"
}

state::remove() {
    local file
    file=$(state::file "$1")
    run --user rm -f -- "$file"
}

# state::driver_at_work: whether run_experiments.sh or stress_test.sh is at work with a mode on the chosen
# GPU; STATE then holds its note (mode, pid, output). The start time tells it from a later process with
# its pid.
state::driver_at_work() {
    state::load driver || return 1
    [[ ${STATE[pid]:-} =~ ^[0-9]+$ && ${STATE[started]:-} =~ ^[0-9]+$ ]] || return 1
    [[ $(process::start "${STATE[pid]}") == "${STATE[started]}" ]]
}

# process::start PID: in the kernel's ticks since the machine started; nothing where it has ended.
process::start() {
    local text
    local -a fields
    text=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
    read -ra fields <<<"${text##*) }" # a program's name may hold anything
    [[ ${fields[0]} == Z ]] || printf '%s' "${fields[19]}"
}

# state::put_back MODE TEXT: undo for state::save. Kept as it is where the rest could not be undone,
# since then there is still something to be undone later.
state::put_back() {
    local -a lines
    ((UNDO_FAILED == 0)) || return 0
    if [[ -z $2 ]]; then
        state::remove "$1"
    else
        mapfile -t lines <<<"$2"
        state::save "$1" "${lines[@]}"
    fi
}
