# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with drivers.sh
#
# Enabling a sharing mode together with its undoing, by the scripts of gpu-configs/.

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
    elif ((!MAY_SET_UP_MIG)) && ! mig::find_devices; then
        printf 'its MIG devices could not be asked: %s' "$NOT_TOLD"
    elif ((!MAY_SET_UP_MIG)) && [[ -n $MIG_LAYOUT ]]; then
        layout::is_there ||
            printf 'the instances %s are not there; --mig allows to make them' "$MIG_LAYOUT"
    elif ((!MAY_SET_UP_MIG)); then
        count=${#MIG_DEVICES[@]}
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
    local -i said_before
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
    ((DRY_RUN)) || mode::note "$mode" || return 1
    ENABLED_MODE=$mode
    said_before=$(stat -c %s -- "$OUTPUT/mode-scripts.log" 2>/dev/null || printf 0)
    if mode::script "${as_root[@]}" "$PROJECT_ROOT/gpu-configs/${flags[0]}" "${flags[@]:1}" \
        --gpu "$GPU_UUID"; then
        ((DRY_RUN)) || mapfile -t -O "${#NOTES[@]}" NOTES < <(mode::said note "$said_before")
    else
        MODE_REASON=$(mode::said error "$said_before" | tail -n 1)
        [[ -z $INTERRUPTED ]] || MODE_REASON=interrupted
        # The script has put its changes back, but for MIG mode that waits for a restart.
        if [[ -n $had_state ]] || ! mode::has_state "$mode"; then
            ENABLED_MODE=""
            mode::forget_note
        fi
        return 1
    fi
}

# mode::said KIND BYTES: the lines that mode scripts said as KIND: past so much of their log.
mode::said() {
    tail -c +$(($2 + 1)) -- "$OUTPUT/mode-scripts.log" 2>/dev/null | sed -n "s/^$1: //p"
}

# Where the user had set up time slicing, undoing is setting that up again, with the length of then.
mode::set_up_again_as_saved() {
    mode::has_state time-slicing && state::load time-slicing && [[ ${STATE[clients]:-} ]] || return 0
    setting::read time-slice && [[ -n $CURRENT ]] || return 0
    MODE_UNDO=(setup_time_slicing.sh "${STATE[clients]}" --timeslice "${CURRENT,,}")
}

# Whether the mode's scripts have something to undo. (In a subshell: a damaged file ends the script.)
mode::has_state() {
    local kind
    for kind in ${STATE_KINDS[$1]:-$1}; do
        ! (state::load "$kind") 2>/dev/null || return 0
    done
    return 1
}

# Undoes what mode::enable did, if anything; not to be interrupted. False, with MODE_REASON, if that
# fails.
mode::undo() {
    [[ -n $ENABLED_MODE ]] || return 0
    local -r mode=$ENABLED_MODE
    ENABLED_MODE=""
    if (signals::ignore && mode::script "${MODE_UNDO[@]}"); then
        mode::forget_note
        return
    fi
    MODE_REASON="$mode could not be undone; run $(quoted "${MODE_UNDO[@]}")"
    log "error: $MODE_REASON"
    return 1
}

# --- what a driver that was killed has left ---------------------------------------------------------

# A mode that a user set up by hand is used and left; one that a driver set up is that driver's to undo.
# So a driver notes, beside the mode's own state, that it is at work with it.
mode::note() {
    local -r file=$(state::file driver)
    (state::save driver "gpu_uuid=$GPU_UUID" "mode=$1" "pid=$$" "started=$(process::start $$)" \
        "output=$(printable "$(realpath -- "$OUTPUT")")") 2>/dev/null && return
    MODE_REASON="cannot write $file; set GPU_SHARING_STATE_DIR to a folder that you may write"
    return 1
}

mode::forget_note() {
    ((DRY_RUN)) || state::remove driver 2>/dev/null || warn "cannot remove $(state::file driver)"
}

# Ends where another driver is at work with a mode on this GPU.
mode::require_no_other_driver() {
    ((HAS_GPU)) && mode::has_state driver || return 0
    ! state::driver_at_work ||
        die "$EXIT_FAILED" "another run is at work with ${STATE[mode]:-a mode} on $(gpu::title): pid" \
            "${STATE[pid]}, into ${STATE[output]:-?}; wait for its end, or stop it"
}

mode::undo_left_behind() {
    local mode
    local -a as_root=()
    ((HAS_GPU)) && mode::has_state driver || return 0
    state::load driver
    mode=${STATE[mode]:-}
    if [[ -z $mode || -z ${UNDO_SCRIPTS[$mode]-} ]] || ! mode::has_state "$mode"; then
        mode::forget_note
        return 0
    fi
    log "$mode was left in force when the script was cut off; it is undone first."
    ! state::needs_root "$mode" || mode::as_root
    ENABLED_MODE=$mode
    MODE_UNDO=("${as_root[@]}" "$PROJECT_ROOT/gpu-configs/${UNDO_SCRIPTS[$mode]}" --gpu "$GPU_UUID")
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
# terminal, or a script that puts back its changes could no longer write. What it took goes to
# mode_scripts.jsonl, as benchmarking/modes/mode_scripts.py writes it.
mode::script() {
    local started_at started ended status=0
    if ((DRY_RUN)); then
        run "$@"
        return
    fi
    started_at=$(date -u +%Y-%m-%dT%H:%M:%S+00:00)
    read -r started _ </proc/uptime
    run "$@" 2>&1 | (signals::ignore && tee -pa "$OUTPUT/mode-scripts.log" >&2 || true) || status=$?
    read -r ended _ </proc/uptime
    mode::record "$started_at" "$(awk -v a="$started" -v b="$ended" 'BEGIN { printf "%.2f", b - a }')" \
        "$status" "$@" 2>/dev/null || true
    return "$status"
}

# mode::record STARTED_AT SECONDS STATUS WORD... --gpu UUID
mode::record() {
    local word script="" arguments=""
    for word in "${@:4:$#-5}"; do
        if [[ $word == "$PROJECT_ROOT/gpu-configs/"* ]]; then
            script=${word##*/}
        elif [[ -n $script ]]; then
            arguments+=",\"$(json::text "$word")\""
        fi
    done
    line::append "$OUTPUT/mode_scripts.jsonl" "$(
        printf '{"script":"%s","arguments":[%s],"gpu_uuid":"%s","started_at":"%s","seconds":%s,"exit_code":%d,"message":null}' \
            "$script" "${arguments#,}" "$GPU_UUID" "$1" "$2" "$3"
    )"
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
            [[ $GPU_MIG_CURRENT == Enabled ]] && mig::find_devices && if [[ -n $MIG_LAYOUT ]]; then
                layout::is_there
            else
                ((${#MIG_DEVICES[@]} >= $2))
            fi
            ;;
    esac
}

# mode::has_timeslice NAME: a saved one that a driver reload has reset since does not count.
mode::has_timeslice() {
    (state::load time-slice && [[ ${STATE[set]:-} == "$1" ]]) 2>/dev/null &&
        setting::read time-slice && [[ $CURRENT == "$1" ]]
}

mode::is_exclusive() { (gpu::refresh && [[ $GPU_COMPUTE_MODE == Exclusive_Process ]]); }

# Whether an MPS daemon of this user answers: one that enable_mps.sh started, or one where CUDA itself
# would look, which the suite is then told of.
mode::finds_daemon() {
    local -r usual=${CUDA_MPS_PIPE_DIRECTORY:-/tmp/nvidia-mps}
    if (mps::load && mps::answers "${STATE[pipe_directory]}") 2>/dev/null; then
        return 0
    fi
    mode::is_own_daemon "$usual" && mps::probe "$usual" && export CUDA_MPS_PIPE_DIRECTORY=$usual
}

# mode::is_own_daemon PIPE_DIRECTORY: /tmp/nvidia-mps is a name that anybody can take first, and fill
# with a link to where a daemon of his own listens.
mode::is_own_daemon() {
    [[ -O $1/control && ! -L $1/control ]] && { [[ -O $1 ]] || [[ $(stat -Lc %u -- "$1") == 0 ]]; }
}
