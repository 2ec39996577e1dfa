# shellcheck shell=bash
# shellcheck disable=SC2034 # set here, read by the scripts that source this
#
# What every mode script shares. A script is a transaction. It checks, saves the previous state, changes,
# asks the driver or the daemon whether the change took, and prints what is in force. Until it has ended
# well, a failure or a signal puts back what it changed. The undo scripts only go forward: stopped half-way,
# their state file is still there and the next run finishes the work.
#
# A question is a function that fills variables, and is false, with NOT_TOLD, where it could not be asked:
# that is neither "there is none" nor "it is off".

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
    local folder facts kept=""
    local -a folders
    local -r owner_of_scripts=$(PATH=/usr/bin:/bin stat -c %u -- "${BASH_SOURCE[0]}")
    IFS=: read -ra folders <<<"$PATH"
    for folder in "${folders[@]}"; do
        facts=$(PATH=/usr/bin:/bin stat -Lc '%u %A' -- "$folder" 2>/dev/null) || continue
        # the ninth letter of drwxr-xr-x: others may write
        if [[ $folder == /* && $facts =~ ^(0|$owner_of_scripts)\ .{8}[^w] ]]; then kept+=:$folder; fi
    done
    PATH=${kept:-:/usr/bin:/bin} # an empty one would mean the working directory
    PATH=${PATH#:}
}
((EUID != 0)) || [[ ${SUDO_UID:-0} == 0 ]] || path::trust

readonly EXIT_FAILED=1 EXIT_USAGE=2 EXIT_NO_GPU=3 EXIT_UNSUPPORTED=4 EXIT_PERMISSION=5 EXIT_BUSY=6

# Root's own, so that nobody who may run these scripts by sudo decides what root puts back.
readonly STATE_OF_ROOT=/var/lib/gpu-sharing-bench
readonly LOCK_OF_ROOT=/etc/gpu-sharing-bench/settings-locked

# How long to wait for a daemon to answer, or for its last clients to leave.
WAIT_SECONDS=${GPU_SHARING_WAIT_SECONDS:-10}
[[ $WAIT_SECONDS =~ ^(0|[1-9][0-9]{0,4})$ ]] || WAIT_SECONDS=10

DRY_RUN=0
GPU_SELECTOR=""
THIS_COMMAND=("./gpu-configs/${0##*/}" "$@")

# --- messages and questions -----------------------------------------------------------------------

# A terminal that was closed takes no text: that must not end the work, or change with what it ends.
log() { printf '%s\n' "$*" >&2 2>/dev/null || true; }
warn() { log "warning: $*"; }

# die CODE TEXT...
die() {
    log "error: ${*:2}"
    exit "$1"
}

# Somebody else's text, such as a process's name, without what would steer the terminal: C1 in UTF-8, too.
printable() {
    local -r text=${1//[[:cntrl:]]/?}
    printf '%s' "${text//$'\xc2'[$'\x80'-$'\x9f']/?}"
}

# join WORD...: with commas between.
join() {
    local IFS=,
    printf '%s' "$*"
}

# The words as they could be typed again; a comma needs no quoting.
quoted() {
    local text
    printf -v text ' %q' "$@"
    text=${text# }
    printf '%s' "${text//\\,/,}"
}

# not_told ANSWER: how a question ends that could not be asked. nvidia-smi prints a table's head before it fails.
not_told() {
    local said=$1
    [[ $said != *"Failed to "* ]] || said="Failed to ${said#*Failed to }"
    NOT_TOLD=$(printable "${said%%$'\n'*}")
    NOT_TOLD=${NOT_TOLD:-nothing was said}
    return 1
}

# require WHAT QUESTION...: ends the script where the question could not be asked.
require() {
    ! "${@:2}" || return 0
    ((EUID == 0)) || [[ $NOT_TOLD != *[Pp]ermission* ]] ||
        die "$EXIT_PERMISSION" "$1 could not be asked: $NOT_TOLD; root may: sudo $(quoted "${THIS_COMMAND[@]}")"
    die "$EXIT_FAILED" "$1 could not be asked: $NOT_TOLD"
}

# wait_until COMMAND...: tries it again for WAIT_SECONDS, by a clock that nobody sets; once in a dry run.
wait_until() {
    local now end
    read -r now _ </proc/uptime
    end=$((${now%.*} + (DRY_RUN ? 0 : WAIT_SECONDS)))
    until "$@"; do
        ((${now%.*} < end)) || return 1
        sleep 0.1
        read -r now _ </proc/uptime
    done
}

# --- flags ----------------------------------------------------------------------------------------

cli::usage_error() { die "$EXIT_USAGE" "$*"$'\n'"Try '${THIS_COMMAND[0]} --help'."; }

# The comment that the script begins with, and what is the same for all.
cli::help() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    cat <<'TEXT'

As in every mode script:
  --gpu INDEX_OR_UUID    which GPU (default: the first; gpu_status.sh: each)
  --dry-run              print what would be done, change nothing
  --help                 this text

Environment: GPU_SHARING_STATE_DIR (where the user's state is kept), GPU_SHARING_WAIT_SECONDS (how long to
wait for an MPS daemon or its clients, default 10), GPU_SETTINGS_LOCKED=1 (forbids to change the card).
Exit codes: 0 done or in force, 1 failed or could not be asked, 2 usage, 3 no driver or GPU, 4 not supported
by this GPU, 5 no permission, 6 something else holds the GPU (named)
TEXT
}

# The variable that each flag sets: to the value that follows or, where the name ends in !, to 1.
declare -A OPTIONS=(["--gpu"]=GPU_SELECTOR ["--dry-run"]="DRY_RUN!")

# cli::parse MOST WORD...: sets the variables of OPTIONS, and POSITIONAL to what else there is, MOST words.
cli::parse() {
    local -ri most=$1
    local flag variable
    shift
    POSITIONAL=()
    while (($#)); do
        flag=${1%%=*}
        if [[ $1 != -* ]]; then
            POSITIONAL+=("$1")
        elif [[ $1 == --help || $1 == -h ]]; then
            cli::help
            exit 0
        elif variable=${OPTIONS[$flag]:-} && [[ -z $variable ]]; then
            cli::usage_error "unknown option: $1"
        elif [[ $variable == *! ]]; then
            [[ $1 == "$flag" ]] || cli::usage_error "$flag takes no value"
            printf -v "${variable%!}" 1
        else
            [[ $1 == "$flag" ]] || set -- "$flag" "${1#*=}" "${@:2}"
            [[ -n ${2:-} && $2 != --* ]] || cli::usage_error "$flag needs a value"
            printf -v "$variable" '%s' "$2"
            shift
        fi
        shift
    done
    ((${#POSITIONAL[@]} <= most)) || cli::usage_error "unexpected argument: ${POSITIONAL[most]}"
}

# --- the invoking user ------------------------------------------------------------------------------

# Under sudo the MPS daemon and its state belong to the user who typed the command, and whatever is done
# in that user's folders is done as that user. What root itself does, it does by root's own state and
# lock; the caller's variables only say where the caller's state is, and that settings are locked.
user::resolve() {
    local entry uid=$EUID
    ((EUID != 0)) || user::inherit_from_sudo GPU_SETTINGS_LOCKED
    if ((EUID == 0)) && [[ ${SUDO_UID:-} =~ ^[1-9][0-9]*$ ]]; then
        uid=$SUDO_UID
        user::inherit_from_sudo GPU_SHARING_STATE_DIR XDG_STATE_HOME
    fi
    entry=$(getent passwd "$uid") || entry="$uid::$uid:$(id -g)::/nonexistent:"
    IFS=: read -r INVOKER_NAME _ INVOKER_UID INVOKER_GID _ INVOKER_HOME _ <<<"$entry"
    ((uid != EUID)) || INVOKER_HOME=${HOME:-$INVOKER_HOME}
    USER_STATE=${GPU_SHARING_STATE_DIR:-${XDG_STATE_HOME:-$INVOKER_HOME/.local/state}/gpu-sharing-bench}
    [[ $USER_STATE == /* ]] || USER_STATE=$PWD/$USER_STATE
    [[ $USER_STATE != *[[:cntrl:]]* ]] || die "$EXIT_USAGE" "the state folder's name holds a" \
        "line break or the like; set GPU_SHARING_STATE_DIR to another"
    ROOT_STATE=$STATE_OF_ROOT
    ((EUID != 0 || uid != 0)) || [[ -z ${GPU_SHARING_STATE_DIR:-} ]] || ROOT_STATE=$USER_STATE # root's own wish
}

# user::inherit_from_sudo NAME...: sudo hands these variables to no command, but has them itself. They are passed
# on: sudo is no parent of the scripts that gpu_status.sh --restore runs.
user::inherit_from_sudo() {
    local line name
    grep -qsx sudo "/proc/$PPID/comm" || return 0
    while IFS= read -r -d '' line; do
        name=${line%%=*}
        [[ " $* " != *" $name "* || -n ${!name:-} ]] || declare -gx "$name=${line#*=}"
    done <"/proc/$PPID/environ"
}

# Runs a program as the invoking user, so that root never writes into a folder that a user owns.
as_user() {
    if ((INVOKER_UID == EUID)); then
        "$@"
    else
        setpriv --reuid="$INVOKER_UID" --regid="$INVOKER_GID" --init-groups \
            env HOME="$INVOKER_HOME" USER="$INVOKER_NAME" LOGNAME="$INVOKER_NAME" "$@"
    fi
}

# --- changes ----------------------------------------------------------------------------------------

# run [--note TEXT] [as_user | card::change] COMMAND...
# Every change goes through here, so that a dry run is complete: it prints and does nothing. TEXT is shown
# instead of the command itself.
run() {
    local note
    case $1 in
        --note)
            note=$2
            shift 2
            ;;
        as_user | card::change) note=$(quoted "${@:2}") ;;
        *) note=$(quoted "$@") ;;
    esac
    if ((DRY_RUN)); then
        printf 'would run: %s\n' "$note"
    else
        log "run: $note"
        "$@"
    fi
}

# card::require WHAT: ends with 5 unless the card's settings may be changed from here.
card::require() {
    local reason
    if [[ -e $LOCK_OF_ROOT ]]; then
        reason="is refused: $LOCK_OF_ROOT says that others share this GPU's settings"
    elif [[ ${GPU_SETTINGS_LOCKED:-0} == 1 ]]; then
        reason="is refused: GPU_SETTINGS_LOCKED=1 says that others share this GPU's settings"
    elif ((EUID != 0)); then
        reason="needs root: sudo $(quoted "${THIS_COMMAND[@]}")"
    else
        return 0
    fi
    ((DRY_RUN)) || die "$EXIT_PERMISSION" "$1 $reason"
    warn "outside of a dry run: $1 $reason"
}

# card::change COMMAND...: keeps in RUN_OUTPUT what was printed. The exit status is not trusted, since
# nvidia-smi ends well with a change that is only pending: the caller reads the setting back.
card::change() {
    card::require "changing a setting of the GPU"
    RUN_OUTPUT=$("$@" 2>&1) || true
}

# card::failed WHAT: a setting that was read back is not what was asked for; ends with the code that
# the driver's own words call for. The words are those of NVIDIA's manuals, unverified on a card.
card::failed() {
    local -r words=$(printable "${RUN_OUTPUT:-nothing was printed}")
    local code=$EXIT_FAILED
    case $words in
        *[Pp]ermission*) code=$EXIT_PERMISSION ;;
        *[Ii]"n use"*)
            code=$EXIT_BUSY
            gpu::find_holders || log "Who uses it could not be asked: $NOT_TOLD"
            gpu::print_holders || true
            ;;
        *"in pending "*" state"*)
            UNDO=() # a restart is what makes it effective: left pending, as it has to be
            die "$EXIT_BUSY" "MIG mode is pending: restart the machine or reset the GPU, then run this again," \
                "or sudo ./gpu-configs/disable_mig.sh to have it off. nvidia-smi said: $words"
            ;;
        *[Nn]"ot "[Ss]upported*) code=$EXIT_UNSUPPORTED ;;
    esac
    die "$code" "$1; nvidia-smi said: $words"
}

# --- undoing after a failure ------------------------------------------------------------------------

UNDO=()
UNDO_FAILED=0

# undo::push COMMAND...: what puts a change back. Pushed *before* the change, because a signal can come
# between a change and the next line; so the command has to look first whether there is anything to do.
undo::push() { ((DRY_RUN)) || UNDO+=("$(printf '%q ' "$@")"); }

undo::on_exit() {
    local -ri status=$?
    local -i i
    trap - ERR EXIT
    trap '' INT TERM HUP PIPE # whoever is impatient, or reads no more, shall not stop the undo
    if ((status != 0 && ${#UNDO[@]} > 0)); then
        log "Putting back what was changed."
        for ((i = ${#UNDO[@]} - 1; i >= 0; i--)); do
            (eval "${UNDO[i]}") || UNDO_FAILED=1
        done
        ((!UNDO_FAILED)) || log "Not everything could be put back; see ./gpu-configs/gpu_status.sh."
    fi
    exit "$status"
}

transaction::begin() {
    trap undo::on_exit EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
    trap 'die "$EXIT_FAILED" "$BASH_COMMAND failed with status $? (${BASH_SOURCE[0]##*/}, line $LINENO)"' ERR
    user::resolve
}

# transaction::take_turn KIND FOLDER UMASK: waits until no other script changes what is kept in the folder of
# this kind of state. A folder in it is locked, which nobody else can open; and root opens no pipe or device of a
# user's by a name that ends in a dot. Where none can be made, nothing can be saved either; and where root may not
# enter it (a home on NFS), or the file system knows no locks, it goes on without.
transaction::take_turn() {
    local lock
    local -i waited=0
    state::is_there "$1" "$2/." directory || true # or it ends here
    (umask "$3" && state::as "$1" mkdir -p -m 700 -- "$2/lock") 2>/dev/null || return 0
    { exec {lock}<"$2/lock/."; } 2>/dev/null || return 0
    # for a second at a time, as a signal is taken between commands; 1 says that another has it
    until flock -w 1 "$lock" || (($? != 1)); do
        ((waited++)) || log "Waiting for another of these scripts to end."
        # other cards' scripts, one after the other, may take minutes
        ((waited < 600)) ||
            die "$EXIT_BUSY" "another of these scripts is at work, which holds $2/lock; wait for its end"
    done
}

# transaction::end COMMAND...: from here on nothing is put back; what is in force is printed by the command.
transaction::end() {
    UNDO=()
    trap : PIPE # done is done, whether or not somebody reads it
    if ((DRY_RUN)); then printf 'Dry run: nothing was changed.\n'; else "$@" || true; fi
}

# --- saved state ------------------------------------------------------------------------------------
#
# KIND is mps (the daemon), time-slicing (how many clients) or driver (a run at work), kept in the
# invoking user's folder; or mig, compute-mode or time-slice, settings of the card that root puts back,
# kept in root's.

declare -A STATE=()
{ read -r BOOT </proc/sys/kernel/random/boot_id; } 2>/dev/null || BOOT=""

state::is_roots() { [[ $1 == mig || $1 == compute-mode || $1 == time-slice ]]; }

# state::file KIND: where the state of this kind is kept, of the chosen GPU.
state::file() {
    local folder=$USER_STATE
    ! state::is_roots "$1" || folder=$ROOT_STATE
    printf '%s/%s-%s.state' "$folder" "$1" "$GPU_UUID"
}

# state::as KIND COMMAND...: runs a command as whose state of this kind is.
state::as() { if state::is_roots "$1"; then "${@:2}"; else as_user "${@:2}"; fi; }

# state::is_there KIND PATH FILE_TYPE: whether that is there. Ends with 5 where somebody else could have
# written it: it names folders that are removed and settings that are put back as root.
state::is_there() {
    local facts owner mode type wanted=$INVOKER_UID
    ! state::is_roots "$1" || wanted=0
    facts=$(state::as "$1" stat -c '%u %a %F' -- "$2" 2>&1) || {
        [[ $facts != *"No such file"* && $facts != *"Not a directory"* ]] || return 1
        state::distrust "cannot look at $2: ${facts##*: }"
    }
    read -r owner mode type <<<"$facts"
    # shellcheck disable=SC2053 # a pattern: an empty file is a type of its own
    [[ $type == $3 ]] ||
        state::distrust "$2 is a $type, which these scripts never make; look at it and remove it"
    ((owner == wanted || owner == 0)) ||
        state::distrust "$2 belongs to user $(id -un "$owner" 2>/dev/null || true) ($owner); remove it"
    (((8#$mode & 8#022) == 0)) ||
        state::distrust "others may write $2; if it is as you left it, chmod go-w $(quoted "$2")"
}

state::distrust() { die "$EXIT_PERMISSION" "$1, or set GPU_SHARING_STATE_DIR to a folder of your own"; }

# state::load KIND: fills STATE; false where nothing is saved.
state::load() {
    local text line
    local -r file=$(state::file "$1")
    STATE=()
    state::is_there "$1" "${file%/*}/." directory && state::is_there "$1" "$file" "regular*file" || return 1
    text=$(state::as "$1" cat -- "$file") || die "$EXIT_PERMISSION" "cannot read $file"
    while IFS= read -r line; do
        [[ ! $line =~ ^([a-z_]+)=(.*)$ ]] || STATE[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
    done <<<"$text"
    [[ ${STATE[gpu_uuid]:-} == "$GPU_UUID" ]] || state::damaged "$1" "no gpu_uuid of this GPU"
}

# Whether what was loaded was saved since the machine was started.
state::is_of_this_boot() { [[ ${STATE[boot]:-$BOOT} == "$BOOT" ]]; }

state::damaged() { die "$EXIT_FAILED" "$(state::file "$1") is damaged ($2); look at it and remove it"; }

# state::save KIND KEY=VALUE...: replaces the file in one step; what was saved before is put back if the
# script fails later. A user's is readable by its owner alone; root's by all, so that gpu_status.sh needs no
# root.
state::save() {
    local umask=077
    local -a before
    local -r file=$(state::file "$1")
    ! state::is_roots "$1" || umask=022
    mapfile -t before < <(state::as "$1" cat -- "$file" 2>/dev/null || true)
    undo::push state::put_back "$1" "${before[@]:1}"
    # shellcheck disable=SC2016 # the inner shell expands
    run --note "save $file: ${*:2}" state::as "$1" bash -p -c '
        umask "$1"
        trap "rm -f -- \"\$2.new\"" EXIT # left where the disk is full
        mkdir -p -- "${2%/*}" && printf "%s\n" "${@:3}" >"$2.new" && sync -- "$2.new" && mv -fT -- "$2.new" "$2"
    ' save "$umask" "$file" "gpu_uuid=$GPU_UUID" "${@:2}" || die "$EXIT_PERMISSION" "cannot write $file as" \
        "$(state::as "$1" id -un); set GPU_SHARING_STATE_DIR to a folder that this user may write"
}

state::remove() {
    local -r file=$(state::file "$1")
    run --note "$(quoted rm -f -- "$file")" state::as "$1" rm -f -- "$file"
}

# state::put_back KIND [KEY=VALUE...]: undo for state::save. Kept as it is where the rest could not be
# undone, since then there is still something to be undone later.
state::put_back() {
    ((UNDO_FAILED == 0)) || return 0
    if (($# == 1)); then state::remove "$1"; else state::save "$@"; fi
}

source "${BASH_SOURCE[0]%/*}/gpu.sh"
source "${BASH_SOURCE[0]%/*}/mps.sh"
source "${BASH_SOURCE[0]%/*}/mig.sh"
