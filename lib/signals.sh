# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with drivers.sh
#
# A signal does not end a driver at once. It is handed to the suite, which stops its clients and
# writes its records; then INTERRUPTED is set, and the driver undoes what it enabled and still makes
# the report of what was done.

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
    local -ri status=$?
    signals::ignore
    refusals::note "$status"
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
    local -i NOW end
    clock::read
    end=$((NOW + CHILD_SECONDS))
    while [[ -n $CHILD ]] && kill -0 "$CHILD" 2>/dev/null; do
        ! clock::is_past "$end" || return 1
        sleep 0.1
    done
}

# Runs a program that gets a signal only through signals::note, or when this script is killed. It needs
# a process group of its own: bash would start a background job of its own group with SIGINT ignored.
signals::run_child() {
    local status
    set -m
    GPU_SHARING_DRIVER_PID=$$ "$@" </dev/null &
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
