#!/usr/bin/env bash
# A program of megarl on the nodes of a job, a task of srun for each rank.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1:00:00
#SBATCH --no-kill
#SBATCH --output=%x-%j.log
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=20100
export MASTER_ADDR MASTER_PORT
srun --mem=0 --no-kill python -m megarl "$@"
