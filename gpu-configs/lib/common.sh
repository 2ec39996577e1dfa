# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# What every mode script shares.
#
# A script here is a transaction. It checks, saves the previous state, changes, asks the driver or the
# daemon whether the change took, and prints what is in force. Until it has ended well, a failure or a
# signal puts back what it changed. The undo scripts only go forward: stopped half-way, their state file
# is still there and the next run finishes the work. Nothing is concluded from a question that failed:
# "could not be asked" is neither "there is none" nor "it is off".

# What a shell may inherit and would work otherwise with: `bash -p` in the first line of each script
# ignores most of it, but not where a script is run as `bash script.sh`.
set +o posix +o noglob +o noclobber +o allexport
shopt -u failglob nullglob nocasematch
unset -v CDPATH GLOBIGNORE TMOUT POSIXLY_CORRECT BASH_ENV ENV COLUMNS PS_FORMAT PS_PERSONALITY GREP_OPTIONS
set -Eeuo pipefail
export LC_ALL=C

# Keeps the folders of PATH that belong to root, or to whose these scripts are: where sudo passes the
# caller's PATH on, nobody else decides which programs root runs.
path::trust() {
    local folder facts owner kept=""
    local -a folders
    local -r owner_of_scripts=$(PATH=/usr/bin:/bin stat -c %u -- "${BASH_SOURCE[0]}")
    IFS=: read -ra folders <<<"$PATH"
    for folder in "${folders[@]}"; do
        facts=$(PATH=/usr/bin:/bin stat -Lc '%u %A' -- "$folder" 2>/dev/null) || continue
        owner=${facts% *}
        # the ninth letter of drwxr-xr-x: others may write
        if [[ $folder == /* && $facts != *w? ]] && ((owner == 0 || owner == owner_of_scripts)); then
            kept+=:$folder
        fi
    done
    PATH=${kept#:}
}
((EUID != 0)) || [[ ${SUDO_UID:-0} == 0 ]] || path::trust

readonly EXIT_FAILED=1
readonly EXIT_USAGE=2
readonly EXIT_NO_GPU=3
readonly EXIT_UNSUPPORTED=4
readonly EXIT_PERMISSION=5
readonly EXIT_BUSY=6

# Root's own, so that nobody who may run these scripts by sudo decides what root puts back.
readonly STATE_OF_ROOT=/var/lib/gpu-sharing-bench
readonly LOCK_OF_ROOT=/etc/gpu-sharing-bench/settings-locked

# How long to wait for a daemon to answer, or for its last clients to leave.
WAIT_SECONDS=${GPU_SHARING_WAIT_SECONDS:-10}
[[ $WAIT_SECONDS =~ ^(0|[1-9][0-9]{0,4})$ ]] || WAIT_SECONDS=10
readonly WAIT_SECONDS

DRY_RUN=0
GPU_SELECTOR=""
THIS_COMMAND=("./gpu-configs/${0##*/}" "$@")
DIED_OF="" # the sentence that `die` ended with

# --- messages -------------------------------------------------------------------------------------

# A terminal that was closed takes no text: that must not end the work, least of all an undo.
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

# --- flags ----------------------------------------------------------------------------------------

cli::usage_error() {
    printf 'error: %s\n' "$*" >&2
    printf "Try '%s --help'.\n" "${THIS_COMMAND[0]}" >&2
    exit "$EXIT_USAGE"
}

# The variable that each flag sets: to the value that follows or, where the name ends in !, to 1.
declare -A OPTIONS=(["--gpu"]=GPU_SELECTOR ["--dry-run"]="DRY_RUN!")

# cli::parse MOST WORD...: sets the variables of OPTIONS, and POSITIONAL to what else there is, MOST words.
# The help is the comment that the script begins with.
cli::parse() {
    local -ri most=$1
    local variable
    shift
    POSITIONAL=()
    while (($#)); do
        case $1 in
            --help | -h)
                sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
                exit 0
                ;;
            -*)
                variable=${OPTIONS[${1%%=*}]:-}
                [[ -n $variable ]] || cli::usage_error "unknown option: $1"
                [[ $1 != *=* || $variable == *! ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
                if [[ $variable == *! ]]; then
                    [[ $1 != *=* ]] || cli::usage_error "${1%%=*} takes no value"
                    printf -v "${variable%!}" 1
                else
                    [[ -n ${2:-} && $2 != --* ]] || cli::usage_error "$1 needs a value"
                    printf -v "$variable" '%s' "$2"
                    shift
                fi
                ;;
            *) POSITIONAL+=("$1") ;;
        esac
        shift
    done
    ((${#POSITIONAL[@]} <= most)) || cli::usage_error "unexpected argument: ${POSITIONAL[most]}"
}

# --- the invoking user ------------------------------------------------------------------------------

# Under sudo the MPS daemon and its state belong to the user who typed the command, and whatever is done
# in that user's folders is done as that user. What root itself does, it does by root's own state and
# lock; the caller's variables only say where the caller's state is, and that settings are locked.
user::resolve() {
    local entry
    entry=$(getent passwd "$EUID") || entry="$EUID::$EUID:$(id -g)::/nonexistent:"
    IFS=: read -r INVOKER_NAME _ INVOKER_UID INVOKER_GID _ INVOKER_HOME _ <<<"$entry"
    INVOKER_HOME=${HOME:-$INVOKER_HOME}
    ROOT_STATE=$STATE_OF_ROOT
    ((EUID != 0)) || user::inherit_from_sudo GPU_SETTINGS_LOCKED
    if ((EUID == 0)) && [[ ${SUDO_UID:-} =~ ^[1-9][0-9]*$ ]]; then
        user::inherit_from_sudo GPU_SHARING_STATE_DIR
        user::inherit_from_sudo XDG_STATE_HOME
        entry=$(getent passwd "$SUDO_UID") || die "$EXIT_FAILED" "no account has the user id $SUDO_UID"
        IFS=: read -r INVOKER_NAME _ INVOKER_UID INVOKER_GID _ INVOKER_HOME _ <<<"$entry"
    elif ((EUID == 0)) && [[ -n ${GPU_SHARING_STATE_DIR:-} ]]; then
        ROOT_STATE=$(user::absolute "$GPU_SHARING_STATE_DIR") # root's own wish
    fi
    USER_STATE=${GPU_SHARING_STATE_DIR:-${XDG_STATE_HOME:-$INVOKER_HOME/.local/state}/gpu-sharing-bench}
    USER_STATE=$(user::absolute "$USER_STATE")
    [[ $USER_STATE != *[[:cntrl:]]* ]] || die "$EXIT_USAGE" "the state folder's name holds a" \
        "line break or the like; set GPU_SHARING_STATE_DIR to another"
    readonly INVOKER_UID INVOKER_GID INVOKER_NAME INVOKER_HOME USER_STATE ROOT_STATE
}

user::absolute() { [[ $1 == /* ]] && printf '%s' "$1" || printf '%s/%s' "$PWD" "$1"; }

# sudo hands no variables back to its command, but they are in its own environment.
user::inherit_from_sudo() {
    local parent line
    [[ -z ${!1:-} ]] || return 0
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
    if [[ -e $LOCK_OF_ROOT ]]; then
        reason="$1 is refused: $LOCK_OF_ROOT says that others share this GPU's settings"
    elif [[ ${GPU_SETTINGS_LOCKED:-0} == 1 ]]; then
        reason="$1 is refused: GPU_SETTINGS_LOCKED=1 says that others share this GPU's settings"
    elif ((EUID != 0)); then
        reason="$1 needs root: sudo $(quoted "${THIS_COMMAND[@]}")"
    fi
    [[ -n $reason ]] || return 0
    ((DRY_RUN)) || die "$EXIT_PERMISSION" "$reason"
    warn "outside of a dry run: $reason"
}

# run [--card] [--user] [--state KIND] [--note TEXT] COMMAND...
# Every change goes through here, so that a dry run is complete: it prints and does nothing.
#   --card   a setting of the GPU: needs root, is refused where settings are locked; what the command
#            printed is kept in RUN_OUTPUT and its exit status is not trusted (nvidia-smi ends well with
#            a change that is only pending): the caller reads the setting back
#   --user   as the invoking user
#   --state  as whose state of this kind is
#   --note   what to show instead of the command itself
run() {
    local note=""
    local -a prefix=()
    while [[ $1 == --* ]]; do
        case $1 in
            --card) prefix=(card::keep_output) ;;
            --user) prefix=(as_user) ;;
            --state) prefix=(state::as "$2") && shift ;;
            --note) note=$2 && shift ;;
        esac
        shift
    done
    note=${note:-$(quoted "$@")}
    if ((DRY_RUN)); then
        printf 'would run: %s\n' "$note"
        return 0
    fi
    [[ ${prefix[*]} != card::keep_output ]] || card::require "changing a setting of the GPU"
    log "run: $note"
    "${prefix[@]}" "$@"
}

card::keep_output() { RUN_OUTPUT=$("$@" 2>&1) || true; }

# unless_dry COMMAND: prints what is in force by that command; after a dry run, that nothing is another.
unless_dry() { if ((DRY_RUN)); then printf 'Dry run: nothing was changed.\n'; else "$@"; fi; }

# card::failed WHAT: a setting that was read back is not what was asked for; ends with the code that
# the driver's own words call for. The words are those of NVIDIA's manuals, unverified on a card.
card::failed() {
    local -r words=$(printable "${RUN_OUTPUT:-nothing was printed}")
    local code=$EXIT_FAILED
    case $words in
        *[Pp]ermission*) code=$EXIT_PERMISSION ;;
        *"In use"* | *"in use"*) code=$EXIT_BUSY ;;
        *"Not Supported"* | *"not supported"*) code=$EXIT_UNSUPPORTED ;;
    esac
    if ((code == EXIT_BUSY)); then
        gpu::find_holders || log "Who uses $(gpu::title) could not be asked: $NOT_TOLD"
        gpu::print_holders
    fi
    die "$code" "$1; nvidia-smi said: $words"
}

# --- undoing after a failure ------------------------------------------------------------------------

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
    trap '' INT TERM HUP # whoever is impatient shall not stop the undo
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

transaction::begin() {
    trap undo::on_exit EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
    trap 'die "$EXIT_FAILED" "$BASH_COMMAND failed with status $? (${0##*/}, line $LINENO)"' ERR
    user::resolve
}

# --- saved state ------------------------------------------------------------------------------------
#
# KIND is mps (the daemon), time-slicing (how many clients) or driver (a run at work), kept in the
# invoking user's folder; or mig, compute-mode or time-slice, settings of the card that root puts back,
# kept in root's.

declare -A STATE=()
# Which script undoes which kinds.
readonly -A UNDO_SCRIPTS=(["time-slicing"]=reset_time_slicing.sh ["mps"]=disable_mps.sh ["mig"]=disable_mig.sh)
readonly -A STATE_KINDS=(["time-slicing"]="time-slicing time-slice" ["mps"]="mps compute-mode" ["mig"]=mig)

state::is_roots() { [[ $1 == mig || $1 == compute-mode || $1 == time-slice ]]; }

# state::file KIND: where the state of this kind for the chosen GPU is kept.
state::file() {
    local folder=$USER_STATE
    ! state::is_roots "$1" || folder=$ROOT_STATE
    printf '%s/%s-%s.state' "$folder" "$1" "$GPU_UUID"
}

# state::as KIND COMMAND...: runs a command as whose state of this kind is.
state::as() {
    if state::is_roots "$1"; then "${@:2}"; else as_user "${@:2}"; fi
}

# state::load KIND: fills STATE; false where nothing is saved.
state::load() {
    local file text line
    STATE=()
    file=$(state::file "$1")
    text=$(state::as "$1" stat -- "$file" 2>&1) || {
        [[ $text != *"No such file"* && $text != *"Not a directory"* ]] || return 1
        die "$EXIT_PERMISSION" "cannot look at $file: ${text##*: }"
    }
    state::require_own "$1" "${file%/*}/." directory
    state::require_own "$1" "$file" "regular*file"
    text=$(state::as "$1" cat -- "$file") || die "$EXIT_PERMISSION" "cannot read $file"
    while IFS= read -r line; do
        [[ ! $line =~ ^([a-z_]+)=(.*)$ ]] || STATE[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
    done <<<"$text"
    [[ ${STATE[gpu_uuid]:-} == "$GPU_UUID" ]] ||
        die "$EXIT_FAILED" "$file is damaged (no gpu_uuid of this GPU); look at it and remove it"
}

# state::require_own KIND PATH FILE_TYPE: ends with 5 where somebody else could have written what is
# there: it names folders that are removed and settings that are put back as root.
state::require_own() {
    local facts owner mode type wanted=$INVOKER_UID
    ! state::is_roots "$1" || wanted=0
    facts=$(state::as "$1" stat -c '%u %a %F' -- "$2" 2>/dev/null) ||
        die "$EXIT_PERMISSION" "cannot look at $2; set GPU_SHARING_STATE_DIR to a folder of your own"
    read -r owner mode type <<<"$facts"
    # shellcheck disable=SC2053 # a pattern: an empty file is a type of its own
    [[ $type == $3 ]] || die "$EXIT_PERMISSION" \
        "$2 is a $type, which these scripts never make; look at it and remove it"
    ((owner == wanted || owner == 0)) ||
        die "$EXIT_PERMISSION" "$2 belongs to user $(id -un "$owner" 2>/dev/null || printf '%s' "$owner")," \
            "not to $(id -un "$wanted" 2>/dev/null || printf '%s' "$wanted"); remove it, or set" \
            "GPU_SHARING_STATE_DIR to a folder of your own"
    (((8#$mode & 8#022) == 0)) || die "$EXIT_PERMISSION" "others may write $2; look whether it is as" \
        "you left it, then: chmod go-w $(quoted "$2")"
}

# state::keep KIND: has what is saved now put back, if the script fails from here on.
state::keep() {
    undo::push state::put_back "$1" "$(state::as "$1" cat -- "$(state::file "$1")" 2>/dev/null || true)"
}

# state::save KIND KEY=VALUE...: replaces the file in one step. A user's is readable by its owner alone;
# root's by all, so that gpu_status.sh needs no root.
state::save() {
    local umask=077
    local -r file=$(state::file "$1")
    ! state::is_roots "$1" || umask=022
    ! state::as "$1" test -d "${file%/*}" || state::require_own "$1" "${file%/*}/." directory
    # shellcheck disable=SC2016 # the inner shell expands
    run --state "$1" --note "save $file: ${*:2}" bash -p -c '
        umask "$1"
        mkdir -p -- "${2%/*}" && printf "%s\n" "${@:3}" >"$2.new" && sync -- "$2.new" && mv -fT -- "$2.new" "$2"
    ' save "$umask" "$file" "gpu_uuid=$GPU_UUID" "${@:2}" || die "$EXIT_PERMISSION" "cannot write $file as" \
        "$(state::as "$1" id -un); set GPU_SHARING_STATE_DIR to a folder that this user may write"
}

state::remove() { run --state "$1" rm -f -- "$(state::file "$1")"; }

# state::put_back KIND TEXT: undo for state::save and state::remove. Kept as it is where the rest could
# not be undone, since then there is still something to be undone later.
state::put_back() {
    local -a lines
    ((UNDO_FAILED == 0)) || return 0
    if [[ -z $2 ]]; then
        state::remove "$1"
    else
        mapfile -t lines <<<"$2"
        state::save "$1" "${lines[@]:1}"
    fi
}

# state::needs_root MODE: whether undoing the mode takes root.
state::needs_root() {
    local kind
    for kind in ${STATE_KINDS[$1]}; do
        state::is_roots "$kind" && state::load "$kind" && return 0
    done
    return 1
}

# state::driver_at_work: whether run_experiments.sh or stress_test.sh is at work with a mode on the chosen
# GPU; STATE then holds its note (mode, pid, output). The start time tells it from a later process with
# its pid.
state::driver_at_work() {
    state::load driver || return 1
    [[ ${STATE[pid]:-} =~ ^[0-9]+$ && ${STATE[started]:-} =~ ^[0-9]+$ ]] || return 1
    [[ $(process::start "${STATE[pid]}") == "${STATE[started]}" ]]
}

# process::runs PID PROGRAM: whether a process runs that program, as far as it may be looked at. What a
# process calls itself is anybody's choice.
process::runs() {
    local program
    program=$(readlink -- "/proc/$1/exe" 2>/dev/null) || return 0
    program=${program% (deleted)}
    [[ ${program##*/} == "$2" ]]
}

# process::start PID: in the kernel's ticks since the machine started; nothing where it has ended.
process::start() {
    local text
    local -a fields
    text=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
    read -ra fields <<<"${text##*) }" # a program's name may hold anything
    [[ ${fields[0]} == Z ]] || printf '%s' "${fields[19]}"
}

# shellcheck source=gpu.sh
source "${BASH_SOURCE[0]%/*}/gpu.sh"
# shellcheck source=mps.sh
source "${BASH_SOURCE[0]%/*}/mps.sh"
# shellcheck source=mig.sh
source "${BASH_SOURCE[0]%/*}/mig.sh"
