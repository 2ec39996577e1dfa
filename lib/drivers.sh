# shellcheck shell=bash
# shellcheck disable=SC2034 # some variables are for the drivers
#
# What run_experiments.sh and stress_test.sh share: their variables here, and in the files sourced
# below flags, the machine, signals, the suite as a child, and the modes with their undoing.

PROJECT_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
readonly PROJECT_ROOT
# shellcheck source=../gpu-configs/lib/common.sh
source "$PROJECT_ROOT/gpu-configs/lib/common.sh"
# shellcheck source=../setup_environment.sh
source "$PROJECT_ROOT/setup_environment.sh"
THIS_COMMAND=("./${0##*/}")

# Under sudo the mode scripts act for the account that called sudo, but everything here runs as
# root, and an MPS daemon serves its own user's clients only.
unset SUDO_USER SUDO_UID SUDO_GID SUDO_COMMAND

readonly SAVED_ARGUMENTS=arguments.nul # script, working folder and arguments, each ended by NUL
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
NOTES=()       # what is to be known of a phase that went well, such as the pipes of a dead daemon
SUITE_BEGUN=0  # from then on its records tell what was done
SUITE_WORDS="" # the sentence that the suite ended with, if it said one

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

# folder::find FOLDER PATTERN: fills FOUND with the paths; signs in the folder's own name match nothing
# but themselves.
folder::find() {
    # shellcheck disable=SC2206 # the second word is a pattern
    FOUND=("$1"/$2)
    [[ -e ${FOUND[0]} ]] || FOUND=()
}

# shellcheck source=records.sh
source "$PROJECT_ROOT/lib/records.sh"
# shellcheck source=flags.sh
source "$PROJECT_ROOT/lib/flags.sh"
# shellcheck source=machine.sh
source "$PROJECT_ROOT/lib/machine.sh"
# shellcheck source=signals.sh
source "$PROJECT_ROOT/lib/signals.sh"
# shellcheck source=suite.sh
source "$PROJECT_ROOT/lib/suite.sh"
# shellcheck source=modes.sh
source "$PROJECT_ROOT/lib/modes.sh"
