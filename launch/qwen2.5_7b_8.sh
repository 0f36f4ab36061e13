#!/usr/bin/env bash
# GSM8K with GRPO on Qwen2.5-7B-Instruct, one node of 8 devices.
# Usage: launch/qwen2.5_7b_8.sh SOURCE [main_ppo overrides], by bash or sbatch (docs/cluster.md). SOURCE: GSM8K as jsonl
# or a downloaded HF copy.
#SBATCH --job-name=megarl-qwen2.5-7b
#SBATCH --nodes=1
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

job qwen2.5_7b_8 1 8 "$@"
[ -n "$word" ] || fail "usage: launch/qwen2.5_7b_8.sh SOURCE [overrides]"
ppo=(--config-name=ppo_megatron_trainer experiment=qwen2.5_7b_8 trainer.strict=true trainer.run_dir="$run"
  trainer.preempt_save_s=540 "${overrides[@]}")

on_first_node "${MEGARL_PYTHON:-python}" -m megarl.data.prepare gsm8k --source "$word" --out ~/data/gsm8k
check "${ppo[@]}"
train megarl.main_ppo "${ppo[@]}"
