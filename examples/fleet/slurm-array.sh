#!/usr/bin/env bash
# A fleet by Slurm, without Ray: each task of the array has a whole node to itself and measures its cards one
# after another: whole GPUs, which no gres/mps, gres/shard or MIG of Slurm's divides. The project's own scripts
# make each mode and undo it.
#
# Not tried on a Slurm cluster. A test runs it with stand-ins for srun and nvidia-smi.
#
#   sbatch --array=0-9 --gres=gpu:8 examples/fleet/slurm-array.sh /shared/fleet --quick    # ten nodes of eight
#   python3 benchmarking/fleet.py report --output /shared/fleet
#
# The first argument is a folder that all nodes share, the others are flags of run_experiments.sh. Ten idle
# nodes get a task each; a task that comes to a node which was measured says so and ends, so name those that
# are left by --nodelist. Ten minutes before the time is up the unit at work gets SIGTERM: it undoes its mode,
# reports, and goes on in the next job with the same command.

#SBATCH --job-name=gpu-sharing-fleet
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@600
set -Eeuo pipefail

output=${1:?the folder of the fleet}
# sbatch runs a copy of this file; the project is where it was called.
cd -- "${SLURM_SUBMIT_DIR:-.}"
exec srun --ntasks=1 python3 benchmarking/fleet.py unit --output "$output" -- "${@:2}"
