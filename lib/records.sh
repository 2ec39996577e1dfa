# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with drivers.sh
#
# What a driver writes down itself, a JSON line at a time, and the words that it hears for it.

readonly REFUSALS_FILE=refusals.jsonl
WORDS=""

# The inside of a JSON string.
json::text() {
    local text=${1//[[:cntrl:]]/ }
    text=${text//\\/\\\\}
    printf '%s' "${text//\"/\\\"}"
}

# line::append FILE TEXT: behind a last line that a full disk cut off, not as a part of it.
line::append() {
    [[ ! -s $1 || -z $(tail -c 1 -- "$1") ]] || printf '\n' >>"$1" || return 1
    printf '%s\n' "$2" >>"$1"
}

# words::from COMMAND...: runs a program and sets WORDS to the sentence that it ended with, where it says
# one (benchmarking/command_line/driver_words.py). By a pipe, since the disk may be what ended it.
words::from() {
    local -i status=0
    local pipe
    WORDS=""
    exec {pipe}<> <(:)
    GPU_SHARING_WORDS_FD=$pipe "$@" || status=$?
    ! read -r -t 0 -u "$pipe" || IFS= read -r -u "$pipe" WORDS || true
    exec {pipe}>&-
    return "$status"
}

# refusals::because SENTENCE: why, where another program has said it.
refusals::because() { DIED_OF=$1; }

# refusals::note STATUS: keeps what this script was refused before the suite was started, which else no
# record would tell. Wrong usage apart; what cannot be written was said on the terminal.
refusals::note() {
    local -r folder=${RESUMED:-${OUTPUT:-results}}
    local command=""
    local word
    ((!DRY_RUN && !SUITE_BEGUN && $1 != 0 && $1 != EXIT_USAGE)) && [[ -n $DIED_OF ]] || return 0
    for word in "./${0##*/}" "${COMMAND_WORDS[@]}"; do
        command+=",\"$(json::text "$word")\""
    done
    {
        mkdir -p -- "$folder" && line::append "$folder/$REFUSALS_FILE" "$(
            printf '{"created_at":"%s","command":[%s],"exit_code":%d,"sentence":"%s"}' \
                "$(date -u +%Y-%m-%dT%H:%M:%S+00:00)" "${command#,}" "$1" "$(json::text "$DIED_OF")"
        )"
    } 2>/dev/null || true
}
