#!/usr/bin/env bash
# Qwen3-235B-A22B with GRPO, TP8 x PP4 on four nodes of 8 devices of 80 GB: sbatch launch/235b.sh [overrides]
# bash launch/235b.sh --plan | --dry-run | --submit [overrides]: docs/cluster.md has the way there.
# The data: ~/data/gsm8k/train.parquet and test.parquet, or data.train_files=[...] data.val_files=[...].
#SBATCH --job-name=megarl-235b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@1800
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
here=$(dirname "$0")/..
if [ ! -e "$here/slurm/job.sh" ]; then # Slurm runs a copy of this file
  here=${MEGARL_ROOT:-$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')")/..}
fi
# shellcheck source-path=SCRIPTDIR source=../slurm/job.sh
source "$here/slurm/job.sh"

job 235b 4 8 "$@"
[ -z "$word" ] || fail "$word is no override: KEY=VALUE"
ppo=(--config-name=ppo_megatron_trainer experiment=qwen3_235b_4x8 trainer.run_dir="$run"
  trainer.preempt_save_s=1500 "${overrides[@]}")

check "${ppo[@]}"
train megarl.main_ppo "${ppo[@]}"
