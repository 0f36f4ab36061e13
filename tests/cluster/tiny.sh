#!/usr/bin/env bash
# The tiny task of the tests on the nodes of a job.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../../slurm/job.sh
source "$MEGARL_ROOT/slurm/job.sh"

job tiny 2 1 "$@"
ppo=(--config-dir=. --config-name=rl trainer.run_dir="$run" "${overrides[@]}")
check "${ppo[@]}"
train megarl.main_ppo "${ppo[@]}"
