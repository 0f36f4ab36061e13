#!/usr/bin/env bash
# Mathematics with GRPO on Qwen3-30B-A3B, two nodes of 8 devices of 80 GB: sbatch launch/qwen3_30b_a3b_16.sh [overrides]
# bash launch/qwen3_30b_a3b_16.sh --plan | --dry-run | --submit [overrides]: docs/cluster.md has the way there.
# The data: ~/data/gsm8k/train.parquet and test.parquet, or data.train_files=[...] data.val_files=[...].
#SBATCH --job-name=megarl-qwen3-30b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
here=$(dirname "$0")/..
if [ ! -e "$here/slurm/job.sh" ]; then # Slurm runs a copy of this file
  here=${MEGARL_ROOT:-$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')")/..}
fi
# shellcheck source-path=SCRIPTDIR source=../slurm/job.sh
source "$here/slurm/job.sh"

job qwen3_30b_a3b_16 2 8 "$@"
[ -z "$word" ] || fail "$word is no override: KEY=VALUE"
ppo=(--config-name=ppo_megatron_trainer experiment=qwen3_30b_a3b_16 trainer.run_dir="$run"
  trainer.preempt_save_s=540 "${overrides[@]}")

check "${ppo[@]}"
train megarl.main_ppo "${ppo[@]}"
