# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with drivers.sh
#
# The flags that run_experiments.sh and stress_test.sh share, and their help.

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
        --output) driver::path "$@" && OUTPUT=$VALUE ;;
        --resume) cli::usage_error "--resume goes on with the flags saved in its folder: give no others" ;;
        --device) driver::choice "$1" "${2-}" auto cpu cuda && DEVICE=$2 ;;
        --repeats) driver::positive_integer "$1" "${2-}" && REPEATS=$2 ;;
        --timeslice) driver::choice "$1" "${2-}" default short medium long && TIMESLICE=$2 ;;
        --plan)
            driver::path "$@"
            [[ -f $VALUE ]] || cli::usage_error "--plan: '$VALUE' is not a file"
            PLAN=$VALUE
            ;;
        --mig-profile) cli::value "$@" && MIG_PROFILE=$VALUE ;;
        --mig-layout) cli::value "$@" && layout::check "$VALUE" && MIG_LAYOUT=$VALUE ;;
        --engine) driver::choice "$1" "${2-}" eager graph compile && SUITE_FLAGS+=("$1" "$2") ;;
        --precision) driver::choice "$1" "${2-}" fp32 tf32 bf16 && SUITE_FLAGS+=("$1" "$2") ;;
        --dataset)
            driver::choice "$1" "${2-}" auto cifar10 folder synthetic && SUITE_FLAGS+=("$1" "$2")
            ;;
        --data-dir)
            driver::path "$@"
            [[ -d $VALUE ]] || cli::usage_error "--data-dir: '$VALUE' is not a folder"
            SUITE_FLAGS+=("$1" "$VALUE")
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
        --quick | --beside-others) SUITE_FLAGS+=("$1") ;;
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

# driver::path FLAG PATH: sets VALUE to the path, such that no program takes it for a flag.
driver::path() {
    cli::value "$@"
    [[ -n $VALUE ]] || cli::usage_error "$1 needs a path"
    [[ $VALUE != -* ]] || VALUE=./$VALUE
}

# driver::positive_integer NAME VALUE
driver::positive_integer() {
    [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] || cli::usage_error "$1 needs a whole number from 1 on, 9999 at most"
}

# driver::positive_number NAME VALUE
driver::positive_number() {
    [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ && $2 =~ [1-9] ]] || cli::usage_error "$1 needs a number above 0"
}

# --- MIG layouts ------------------------------------------------------------------------------------

layout::check() {
    [[ $1 =~ ^$MIG_PROFILE_PATTERN(,$MIG_PROFILE_PATTERN)*$ ]] ||
        cli::usage_error "--mig-layout needs MIG profiles with commas between, such as 2g.20gb,1g.10gb"
}

# How many instances the layout has.
layout::count() {
    local -a profiles
    IFS=, read -ra profiles <<<"$MIG_LAYOUT"
    printf '%d' "${#profiles[@]}"
}

# layout::unknown_profiles PROFILE,PROFILE,...: prints, with commas, those that are not in PROFILE_NAMES.
layout::unknown_profiles() {
    local -a wanted
    local name unknown=""
    IFS=, read -ra wanted <<<"$1"
    for name in "${wanted[@]}"; do
        [[ -n ${PROFILE_ID[$name]:-} || ,$unknown, == *",$name,"* ]] || unknown+=",$name"
    done
    printf '%s' "${unknown#,}"
}

# layout::is_there: whether MIG_DEVICES has one for each profile of the layout.
layout::is_there() {
    local -a wanted
    local name
    local -A free=()
    for name in "${MIG_DEVICES[@]#* }"; do free[$name]=$((${free[$name]:-0} + 1)); done
    IFS=, read -ra wanted <<<"$MIG_LAYOUT"
    for name in "${wanted[@]}"; do
        ((${free[$name]:-0} > 0)) || return 1
        free[$name]=$((free[$name] - 1))
    done
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
    unknown=$(layout::unknown_profiles "$MIG_LAYOUT")
    [[ -z $unknown ]] || cli::usage_error "--mig-layout: $(gpu::title) has no profile $unknown; it has" \
        "${PROFILE_NAMES[*]}"
}

driver::shared_flags_help() {
    cat <<'HELP'
  --quick               small jobs, for a demonstration
  --beside-others       measure although other people's processes are on the GPU
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
