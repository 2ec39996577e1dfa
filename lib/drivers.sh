# shellcheck shell=bash
# shellcheck disable=SC2034 # some variables are for the drivers
#
# What run_experiments.sh and stress_test.sh share: flags, the machine, the suite as a child that can
# be interrupted, and enabling a mode together with its undoing.
#
# A signal does not end the script at once. It is handed to the suite, which stops its clients and
# writes its records; then INTERRUPTED is set, and the script undoes what it enabled and still makes
# the report of what was done.

PROJECT_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
readonly PROJECT_ROOT
# shellcheck source=../gpu-configs/lib/common.sh
source "$PROJECT_ROOT/gpu-configs/lib/common.sh"
# shellcheck source=../gpu-configs/lib/gpu.sh
source "$PROJECT_ROOT/gpu-configs/lib/gpu.sh"
# shellcheck source=../gpu-configs/lib/mig.sh
source "$PROJECT_ROOT/gpu-configs/lib/mig.sh"
# shellcheck source=../gpu-configs/lib/mps.sh
source "$PROJECT_ROOT/gpu-configs/lib/mps.sh"
# shellcheck source=../setup_environment.sh
source "$PROJECT_ROOT/setup_environment.sh"
THIS_COMMAND=("./${0##*/}")

# Under sudo the mode scripts act for the account that called sudo, but everything here runs as
# root, and an MPS daemon serves its own user's clients only.
unset SUDO_USER SUDO_UID SUDO_GID SUDO_COMMAND

readonly SAVED_ARGUMENTS=arguments.nul # script, working folder and arguments, each ended by NUL
readonly ENABLED_MODE_FILE=enabled-mode # the mode that is in force on this script's behalf
OUTPUT=""
DEVICE=auto
REPEATS=""
TIMESLICE=""
MPS_EXCLUSIVE=0
MAY_SET_UP_MIG=0
MIG_PROFILE=1g.5gb # the guide's; setup_mig.sh takes this card's profile of the same size for it
MIG_LAYOUT=""      # or one profile a client, where they differ
SUITE_FLAGS=()
MPS_FLAGS=()    # limits of MPS clients, for the suite under mps alone
PLAN=""         # a file with jobs of the user's own, in place of a mix
PLAN_CLIENTS="" # how many clients it lists

HAS_GPU=0
CHILD=""         # pid of the suite while it runs
CHILD_SECONDS=30 # how long a suite that was told to stop may take when the script itself has to end
INTERRUPTED=""   # exit code that a signal asks for
COMMAND_WORDS=() # the command's arguments: those given, or with --resume those saved
RESUMED=""       # folder that --resume goes on with
ENABLED_MODE=""
MODE_UNDO=()
MODE_REASON="" # why a mode could not be enabled or undone

# --- flags ------------------------------------------------------------------------------------------

# driver::take_arguments WORD...: sets COMMAND_WORDS; with --resume DIR they are those saved in DIR,
# where they were given from.
driver::take_arguments() {
    local -a saved
    COMMAND_WORDS=("$@")
    [[ ${1-} == --resume || ${1-} == --resume=* ]] || return 0
    cli::split "$@"
    ((${#ARGUMENTS[@]} == 2)) ||
        cli::usage_error "--resume needs a folder and takes no other flags: it goes on with those saved there"
    RESUMED=$(realpath -e -- "${ARGUMENTS[1]}" 2>/dev/null) && [[ -f $RESUMED/$SAVED_ARGUMENTS ]] ||
        cli::usage_error "--resume: '${ARGUMENTS[1]}' holds no $SAVED_ARGUMENTS; name the folder of an" \
            "earlier ${0##*/}"
    mapfile -d '' -t saved <"$RESUMED/$SAVED_ARGUMENTS"
    [[ ${saved[0]-} == "${0##*/}" ]] ||
        cli::usage_error "--resume: $RESUMED was made by ${saved[0]-}; go on with that"
    cd -- "${saved[1]}" || die "$EXIT_USAGE" "the folder that it was started from is gone: ${saved[1]}"
    COMMAND_WORDS=("${saved[@]:2}")
}

# Takes a flag that both drivers know; sets CONSUMED to the number of words it used.
driver::flag() {
    CONSUMED=2
    case $1 in
        --output) cli::value "$@" && OUTPUT=$VALUE ;;
        --resume) cli::usage_error "--resume goes on with the flags saved in its folder: give no others" ;;
        --device) driver::choice "$1" "${2-}" auto cpu cuda && DEVICE=$2 ;;
        --repeats) driver::positive_integer "$1" "${2-}" && REPEATS=$2 ;;
        --timeslice) driver::choice "$1" "${2-}" default short medium long && TIMESLICE=$2 ;;
        --plan)
            [[ -f ${2-} ]] || cli::usage_error "--plan: '${2-}' is not a file"
            PLAN=$2
            ;;
        --mig-profile) cli::value "$@" && MIG_PROFILE=$VALUE ;;
        --mig-layout) cli::value "$@" && layout::check "$VALUE" && MIG_LAYOUT=$VALUE ;;
        --engine) driver::choice "$1" "${2-}" eager graph compile && SUITE_FLAGS+=("$1" "$2") ;;
        --precision) driver::choice "$1" "${2-}" fp32 tf32 bf16 && SUITE_FLAGS+=("$1" "$2") ;;
        --dataset)
            driver::choice "$1" "${2-}" auto cifar10 folder synthetic && SUITE_FLAGS+=("$1" "$2")
            ;;
        --data-dir)
            [[ -d ${2-} ]] || cli::usage_error "--data-dir: '${2-}' is not a folder"
            SUITE_FLAGS+=("$1" "$2")
            ;;
        --mps-percentage | --mps-memory-limit | --mps-priority)
            cli::value "$@" && MPS_FLAGS+=("$1" "$VALUE")
            ;;
        --seed)
            [[ ${2-} =~ ^[0-9]+$ ]] || cli::usage_error "--seed needs a whole number from 0 on"
            SUITE_FLAGS+=("$1" "$2")
            ;;
        *) driver::switch "$@" ;;
    esac
}

driver::switch() {
    CONSUMED=1
    case $1 in
        --quick) SUITE_FLAGS+=(--quick) ;;
        --exclusive) MPS_EXCLUSIVE=1 ;;
        --mig) MAY_SET_UP_MIG=1 ;;
        *) cli::common_flag "$@" ;;
    esac
}

# driver::choice FLAG VALUE CHOICE...
driver::choice() {
    local choice
    for choice in "${@:3}"; do
        [[ $2 != "$choice" ]] || return 0
    done
    cli::usage_error "$1 needs one of: ${*:3}"
}

# driver::positive_integer NAME VALUE
driver::positive_integer() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || cli::usage_error "$1 needs a whole number from 1 on"
}

# driver::positive_number NAME VALUE
driver::positive_number() {
    [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ && $2 =~ [1-9] ]] || cli::usage_error "$1 needs a number above 0"
}

# --- MIG layouts ------------------------------------------------------------------------------------

layout::check() {
    [[ $1 =~ ^[0-9]+g\.[0-9]+gb([+-][a-z.]+)*(,[0-9]+g\.[0-9]+gb([+-][a-z.]+)*)*$ ]] ||
        cli::usage_error "--mig-layout needs MIG profiles with commas between, such as 2g.20gb,1g.10gb"
}

# How many instances the layout has.
layout::count() {
    local -a profiles
    IFS=, read -ra profiles <<<"$MIG_LAYOUT"
    printf '%d' "${#profiles[@]}"
}

# layout::require CLIENTS: ends with a usage error where the layout lacks an instance for a client, or
# names a profile that this GPU does not list.
layout::require() {
    local unknown
    [[ -n $MIG_LAYOUT ]] || return 0
    (($1 <= $(layout::count))) ||
        cli::usage_error "--mig-layout has $(layout::count) instances for $1 jobs; name one for each"
    ((HAS_GPU)) && [[ $GPU_MIG_CURRENT != *N/A* ]] || return 0
    mig::read_profiles
    unknown=$(mig::unknown_profiles "$MIG_LAYOUT")
    [[ -z $unknown ]] || cli::usage_error "--mig-layout: $(gpu::title) has no profile $unknown; it has" \
        "${PROFILE_NAMES[*]}"
}

driver::shared_flags_help() {
    cat <<'HELP'
  --quick               small jobs, for a demonstration
  --repeats N           repeats of each co-run
  --output DIR          folder for the runs and the report; must not hold an earlier one
  --resume DIR          go on with what was cut off in that folder, with the flags saved there
  --gpu INDEX_OR_UUID   which GPU (default: the first one visible)
  --device auto|cuda|cpu  cpu: the CPU demonstration, even where there is a GPU
  --engine, --precision, --seed, --dataset, --data-dir   passed on to the jobs
  --mps-percentage even|N[,N...], --mps-memory-limit, --mps-priority   limits of the clients under mps
                        (see benchmarking/benchmark_suite.py --help)
  --plan FILE           jobs of your own, any command among them, in place of the mix
  --dry-run             print every command and change nothing

Changes to the GPU's settings are made only when told to, need root (sudo without a password, or a
root shell), and are undone at the end:
  --mig                 the mig mode may switch MIG on and make its instances
  --mig-profile NAME    size of these instances (default 1g.5gb, or this GPU's one-slice profile)
  --mig-layout LIST     or the instance of each job, such as 2g.20gb,1g.10gb,1g.10gb
  --exclusive           MPS with compute mode EXCLUSIVE_PROCESS
  --timeslice default|short|medium|long   length of a time slice
HELP
}

# --- the machine ------------------------------------------------------------------------------------

# Sets the environment up and reads the plan, if there is one.
driver::set_up() {
    if ((DRY_RUN)); then
        driver::find_python
    else
        environment::set_up "$PROJECT_ROOT/requirements.txt"
    fi
    [[ -z $PLAN ]] || plan::read
}

# driver::prepare DEFAULT_OUTPUT: makes the folder, or takes that of --resume; minds signals from then
# on.
driver::prepare() {
    if [[ -n $RESUMED ]]; then
        OUTPUT=$RESUMED
        driver::require_nobody_at_work
        signals::install
        mode::undo_left_behind
        return
    fi
    OUTPUT=${OUTPUT:-$1}
    if compgen -G "$OUTPUT/*" >/dev/null; then
        cli::usage_error "--output: $OUTPUT is not empty; name another folder"
    fi
    run mkdir -p -- "$OUTPUT" || die "$EXIT_USAGE" "cannot make the folder $OUTPUT; name another" \
        "by --output"
    ((DRY_RUN)) ||
        printf '%s\0' "${0##*/}" "$PWD" "${COMMAND_WORDS[@]}" >"$OUTPUT/$SAVED_ARGUMENTS"
    signals::install
}

# A suite outlives a driver that was killed.
driver::require_nobody_at_work() {
    local lock
    for lock in "$OUTPUT"/*/run.lock; do
        [[ ! -e $lock ]] || flock --nonblock "$lock" true ||
            die "$EXIT_USAGE" "the suite is still at work in ${lock%/*}; wait for its end, or stop it"
    done
}

driver::find_python() {
    environment::find "$PROJECT_ROOT/requirements.txt" && return
    printf 'would install: requirements.txt into %s\n' "$VENV_FOLDER"
    PYTHON=$VENV_PYTHON
}

# Sets PLAN_CLIENTS, or ends with the plan file's mistakes. Where the environment is yet to be made,
# which only a dry run goes on with, the plan counts as one client.
plan::read() {
    local said
    PLAN_CLIENTS=1
    if ! command -v "$PYTHON" >/dev/null; then
        log "$PLAN is checked once there is an environment; one client is assumed here."
        return
    fi
    said=$("$PYTHON" "$PROJECT_ROOT/benchmarking/check_plan.py" "$PLAN") || exit "$EXIT_USAGE"
    PLAN_CLIENTS=${said##*clients: }
}

# Sets HAS_GPU and, with a GPU, everything that gpu::select sets. Ends with 3 where a GPU is asked for
# or there, but cannot be used: only a machine without one gets the CPU demonstration unasked.
machine::inspect() {
    if [[ $DEVICE == cpu ]]; then
        log "CPU demonstration, as asked for (--device cpu)."
    elif [[ $DEVICE == auto && ${CUDA_VISIBLE_DEVICES-unset} =~ ^(-1)?$ ]]; then
        log "CPU demonstration: CUDA_VISIBLE_DEVICES hides every GPU."
    elif machine::lists_a_gpu; then
        if [[ -z $GPU_SELECTOR && ${CUDA_VISIBLE_DEVICES:-} =~ ^([0-9]+|GPU-[^,]+) ]]; then
            GPU_SELECTOR=${BASH_REMATCH[1]}
        fi
        user::resolve
        gpu::select
        HAS_GPU=1
        log "$(gpu::title)"
    elif [[ $DEVICE == cuda || -n $GPU_SELECTOR ]]; then
        die "$EXIT_NO_GPU" "no NVIDIA GPU was found; without --device cuda and --gpu the CPU" \
            "demonstration runs"
    else
        log "No NVIDIA GPU was found: this is the CPU demonstration, no sharing mode is in force."
    fi
}

machine::lists_a_gpu() {
    local output
    if ! command -v nvidia-smi >/dev/null; then
        [[ ! -e /proc/driver/nvidia/version ]] ||
            die "$EXIT_NO_GPU" "an NVIDIA driver is loaded but nvidia-smi was not found; add it to" \
                "the PATH, or choose --device cpu"
        return 1
    fi
    output=$(nvidia-smi -L 2>&1) || true
    case $output in
        *"GPU 0:"*) return 0 ;;
        "" | *"No devices"*) return 1 ;;
    esac
    die "$EXIT_NO_GPU" "nvidia-smi does not answer (${output%%$'\n'*}); mend the driver, or choose" \
        "--device cpu"
}

# machine::mode_name MODE: what a run under the mode may be called here.
machine::mode_name() { ((HAS_GPU)) && printf '%s' "$1" || printf cpu-demo; }

# --- signals and children -----------------------------------------------------------------------------

signals::install() {
    trap 'signals::note 130' INT
    trap 'signals::note 143' TERM
    trap 'signals::note 129' HUP
    trap : PIPE # `| tee` may be gone; ignored, it would be ignored by the children as well
    trap signals::on_exit EXIT
}

signals::ignore() { trap '' INT TERM HUP; }

# The first signal asks the suite to stop as Ctrl-C does, a later one ends it; its clients end with it,
# since they hang on its pipes. Told before anything is said: the terminal may be what has gone.
signals::note() {
    local -r name=$([[ -z $INTERRUPTED ]] && printf INT || printf TERM)
    [[ -z $CHILD ]] || kill -s "$name" "$CHILD" 2>/dev/null || true
    INTERRUPTED=$1
    signals::leave_dead_terminal
    log "Stopping: what was enabled is undone, and what was done is reported."
}

# Undoing and reporting are done by programs that fail where they cannot write: a closed terminal, or
# a pipe whose reader has ended, is exchanged for a file.
signals::leave_dead_terminal() {
    local file=$OUTPUT/after-hangup.log
    [[ -d $OUTPUT && -w $OUTPUT ]] || file=/dev/null
    printf '\n' >&2 2>/dev/null || exec </dev/null >>"$file" 2>&1
    [[ ! -p /dev/stdout ]] || printf '\n' 2>/dev/null || exec >>"$file"
}

# However the script ends: the mode outlives the suite, or its clients would run on without it.
signals::on_exit() {
    signals::ignore
    signals::end_child
    mode::undo
}

signals::end_child() {
    local name
    [[ -n $INTERRUPTED || -z $CHILD ]] || kill -s INT "$CHILD" 2>/dev/null || true
    for name in TERM KILL; do
        signals::child_ends || kill -s "$name" "$CHILD" 2>/dev/null || true
    done
    signals::child_ends || true
    CHILD=""
}

# Whether the suite ends within CHILD_SECONDS, if there is one.
signals::child_ends() {
    local -ri until=$((SECONDS + CHILD_SECONDS))
    while [[ -n $CHILD ]] && kill -0 "$CHILD" 2>/dev/null; do
        ((SECONDS < until)) || return 1
        sleep 0.1
    done
}

# Runs a program that gets a signal only through signals::note. It needs a process group of its own:
# bash would start a background job of its own group with SIGINT ignored.
signals::run_child() {
    local status
    set -m
    "$@" </dev/null &
    CHILD=$!
    set +m
    [[ -z $INTERRUPTED ]] || kill -s INT "$CHILD" 2>/dev/null || true
    while true; do # a signal ends `wait` too early
        status=0
        wait "$CHILD" || status=$?
        kill -0 "$CHILD" 2>/dev/null || break
    done
    CHILD=""
    return "$status"
}

# --- suite and analysis -------------------------------------------------------------------------------

# suite::run RUN_ID FLAG...: runs the suite into $OUTPUT/RUN_ID, or goes on with the run that is there;
# sets SUITE_STATUS to its exit code.
suite::run() {
    if [[ -n $RESUMED && -e $OUTPUT/$1/manifest.json ]]; then
        suite::resume "$1"
        return
    fi
    # A run that was cut off before its first word has left an empty folder.
    [[ -z $RESUMED || ! -d $OUTPUT/$1 ]] || { rm -f -- "$OUTPUT/$1/run.lock" && rmdir -- "$OUTPUT/$1"; } ||
        true
    local -a command=("$PYTHON" "$PROJECT_ROOT/benchmarking/benchmark_suite.py" "${@:2}"
        --results-dir "$OUTPUT" --run-id "$1" --device "$DEVICE" "${SUITE_FLAGS[@]}")
    ((!HAS_GPU)) || command+=(--gpu "$GPU_UUID")
    [[ -z $MIG_LAYOUT || " $* " != *" --mode mig "* ]] || command+=(--mig-layout "$MIG_LAYOUT")
    suite::execute "${command[@]}"
}

# suite::resume RUN_ID: a run that came to its end, even to a breaking point, is left as it is.
suite::resume() {
    SUITE_STATUS=0
    ! suite::had_outcome "$1" complete || return 0
    suite::execute "$PYTHON" "$PROJECT_ROOT/benchmarking/benchmark_suite.py" --resume "$OUTPUT/$1"
    if ((SUITE_STATUS == EXIT_USAGE)) && suite::had_outcome "$1" failed; then
        SUITE_STATUS=1
    fi
}

suite::had_outcome() { grep -q "^  \"outcome\": \"$2\"" "$OUTPUT/$1/manifest.json"; }

# suite::execute COMMAND...: runs the suite as a child that gets signals; sets SUITE_STATUS.
suite::execute() {
    local -a command=("$@")
    SUITE_STATUS=0
    run --note "$(quoted "${command[@]}")" signals::run_child "${command[@]}" || SUITE_STATUS=$?
    if [[ -n $INTERRUPTED ]]; then
        SUITE_STATUS=130
        signals::leave_dead_terminal # its reader may have ended a moment after the signal
    fi
}

# What the suite's exit code says, in words.
suite::reason() {
    case $1 in
        1) printf 'a co-run failed' ;;
        2) printf 'the suite refused its arguments' ;;
        3) printf 'the suite found no usable GPU' ;;
        4) printf 'the mode was not in force' ;;
        5) printf 'there is no proof that the mode was in force' ;;
        130) printf 'interrupted' ;;
        *) printf 'the suite ended with status %s' "$1" ;;
    esac
}

analysis::run() {
    run "$PYTHON" "$PROJECT_ROOT/benchmarking/analyze_results.py" --results-dir "$OUTPUT" --each-run
}

# --- modes --------------------------------------------------------------------------------------------

# mode::why_not MODE CLIENTS: prints why the mode cannot be used here, or nothing.
mode::why_not() {
    local -r mode=$1 clients=$2
    local count
    if ((!HAS_GPU)); then
        printf 'no NVIDIA GPU'
    elif [[ $mode != mig ]]; then
        [[ $GPU_MIG_CURRENT != Enabled ]] || printf 'MIG is on, so there is no whole GPU to use'
    elif [[ $GPU_MIG_CURRENT == *N/A* ]]; then
        printf '%s has no MIG' "$GPU_NAME"
    elif ((!MAY_SET_UP_MIG)) && [[ $GPU_MIG_CURRENT != Enabled ]]; then
        printf 'MIG is off; --mig allows to switch it on'
    elif ((!MAY_SET_UP_MIG)) && [[ -n $MIG_LAYOUT ]]; then
        mig::has_layout "$MIG_LAYOUT" ||
            printf 'the instances %s are not there; --mig allows to make them' "$MIG_LAYOUT"
    elif ((!MAY_SET_UP_MIG)); then
        count=$(mig::devices | wc -l)
        ((count >= clients)) ||
            printf '%d MIG instances for %d clients; --mig allows to make them' "$count" "$clients"
    fi
}

# mode::enable MODE CLIENTS: puts the mode in force, for mode::undo to undo, unless it is already.
# False, with MODE_REASON, if that fails.
mode::enable() {
    local -r mode=$1 clients=$2
    local -a as_root=() flags=()
    local had_state
    if mode::is_in_force "$mode" "$clients"; then
        log "$mode is set up already; it is used as it is and left so."
        return 0
    fi
    case $mode in
        time-slicing)
            flags=(setup_time_slicing.sh "$clients")
            MODE_UNDO=(reset_time_slicing.sh)
            [[ -z $TIMESLICE ]] || {
                mode::as_root && flags+=(--timeslice "$TIMESLICE")
                mode::set_up_again_as_saved
            }
            ;;
        mps)
            flags=(enable_mps.sh)
            MODE_UNDO=(disable_mps.sh)
            ((!MPS_EXCLUSIVE)) || {
                mode::as_root && flags+=(--exclusive)
                ! mode::has_state mps ||
                    warn "MPS is set up without --exclusive; it is switched off altogether at the end"
            }
            ;;
        mig)
            flags=(setup_mig.sh "${MIG_LAYOUT:-$MIG_PROFILE}")
            [[ -n $MIG_LAYOUT ]] || flags+=("$clients")
            MODE_UNDO=(disable_mig.sh)
            mode::as_root
            ;;
    esac
    MODE_UNDO=("${as_root[@]}" "$PROJECT_ROOT/gpu-configs/${MODE_UNDO[0]}" "${MODE_UNDO[@]:1}"
        --gpu "$GPU_UUID")
    had_state=$(mode::has_state "$mode" && printf yes) || true
    # Noted before the change: a signal can come between the two.
    ENABLED_MODE=$mode
    ((DRY_RUN)) || printf '%s\n' "$mode" >"$OUTPUT/$ENABLED_MODE_FILE"
    if ! mode::script "${as_root[@]}" "$PROJECT_ROOT/gpu-configs/${flags[0]}" "${flags[@]:1}" \
        --gpu "$GPU_UUID"; then
        MODE_REASON=$(sed -n 's/^error: //p' "$OUTPUT/mode-scripts.log" | tail -n 1)
        [[ -z $INTERRUPTED ]] || MODE_REASON=interrupted
        # The script has put its changes back, but for MIG mode that waits for a restart.
        if [[ -n $had_state ]] || ! mode::has_state "$mode"; then
            ENABLED_MODE=""
            rm -f -- "$OUTPUT/$ENABLED_MODE_FILE"
        fi
        return 1
    fi
}

# Where the user had set up time slicing with another length, undoing is setting that up again.
mode::set_up_again_as_saved() {
    mode::has_state time-slicing || return 0
    state::load time-slicing
    [[ ${STATE[clients]:-} && ${STATE[timeslice]:-} ]] || return 0
    MODE_UNDO=(setup_time_slicing.sh "${STATE[clients]}" --timeslice "${STATE[timeslice],,}")
}

# Whether the mode's scripts have something to undo. (In a subshell: a damaged file ends the script.)
mode::has_state() { (state::load "$1") 2>/dev/null; }

# Undoes what mode::enable did, if anything; not to be interrupted. False, with MODE_REASON, if that
# fails.
mode::undo() {
    [[ -n $ENABLED_MODE ]] || return 0
    local -r mode=$ENABLED_MODE
    ENABLED_MODE=""
    if (signals::ignore && mode::script "${MODE_UNDO[@]}"); then
        rm -f -- "$OUTPUT/$ENABLED_MODE_FILE"
        return
    fi
    MODE_REASON="$mode could not be undone; run $(quoted "${MODE_UNDO[@]}")"
    log "error: $MODE_REASON"
    return 1
}

# Undoes what a driver that was killed has left in force.
mode::undo_left_behind() {
    local -rA scripts=([time-slicing]=reset_time_slicing.sh [mps]=disable_mps.sh [mig]=disable_mig.sh)
    local mode=""
    local -a as_root=()
    ((HAS_GPU)) && [[ -f $OUTPUT/$ENABLED_MODE_FILE ]] || return 0
    read -r mode <"$OUTPUT/$ENABLED_MODE_FILE" || true
    [[ -n $mode && -n ${scripts[$mode]-} ]] && mode::has_state "$mode" || return 0
    log "$mode was left in force when the script was cut off; it is undone first."
    if [[ $mode != mps ]] || mode::is_exclusive; then
        mode::as_root
    fi
    ENABLED_MODE=$mode
    MODE_UNDO=("${as_root[@]}" "$PROJECT_ROOT/gpu-configs/${scripts[$mode]}" --gpu "$GPU_UUID")
    mode::undo || exit "$EXIT_FAILED"
    gpu::refresh
}

# Sets the caller's `as_root` to what runs a card-changing script; where sudo would ask for a password,
# the script itself says that it needs root.
mode::as_root() {
    as_root=()
    if ((EUID != 0)) && [[ ${GPU_SETTINGS_LOCKED:-0} != 1 ]] && sudo -n true 2>/dev/null; then
        as_root=(sudo -n)
    fi
}

# Runs a mode script; its words are kept in mode-scripts.log too. tee must outlive Ctrl-C and a closed
# terminal, or a script that puts back its changes could no longer write.
mode::script() {
    if ((DRY_RUN)); then
        run "$@"
    else
        run "$@" 2>&1 | (signals::ignore && tee -pa "$OUTPUT/mode-scripts.log" >&2 || true)
    fi
}

# Whether the mode is set up already, and in the way that the flags ask for.
mode::is_in_force() {
    case $1 in
        # A daemon of the user's need not go: time slicing needs no script then, the suite keeps its
        # clients away from the daemon.
        time-slicing)
            if [[ -n $TIMESLICE ]]; then
                mode::has_timeslice "${TIMESLICE^}"
            else
                mode::has_state time-slicing || mode::finds_daemon
            fi
            ;;
        mps) mode::finds_daemon && { ((!MPS_EXCLUSIVE)) || mode::is_exclusive; } ;;
        mig)
            [[ $GPU_MIG_CURRENT == Enabled ]] && if [[ -n $MIG_LAYOUT ]]; then
                mig::has_layout "$MIG_LAYOUT"
            else
                (($(mig::devices | wc -l) >= $2))
            fi
            ;;
    esac
}

# mode::has_timeslice NAME: a saved one that a driver reload has reset since does not count.
mode::has_timeslice() {
    (state::load time-slicing && [[ ${STATE[timeslice]:-} == "$1" ]]) 2>/dev/null &&
        [[ $(gpu::timeslice) == "$1" ]]
}

mode::is_exclusive() { (gpu::refresh && [[ $GPU_COMPUTE_MODE == Exclusive_Process ]]); }

# Whether an MPS daemon of this user answers: one that enable_mps.sh started, or one where CUDA itself
# would look, which the suite is then told of.
mode::finds_daemon() {
    local -r usual=${CUDA_MPS_PIPE_DIRECTORY:-/tmp/nvidia-mps}
    if (state::load mps && mps::answers "${STATE[pipe_directory]:-}") 2>/dev/null; then
        return 0
    fi
    [[ -O $usual/control ]] && mps::answers "$usual" && export CUDA_MPS_PIPE_DIRECTORY=$usual
}
