#!/usr/bin/env bash
# The real GSM8K through the whole path on two CPU cores: byte-pair tokenizer trained on it, small fresh model, SFT of
# 200 steps, ten steps of GRPO. The model is too small to reason; the reward is for the form of its answers, too.
# Usage: launch/gsm8k_tiny.sh SOURCE [main_ppo overrides], by bash or sbatch (docs/cluster.md). SOURCE: a folder with
# train.jsonl and test.jsonl, or a downloaded HF copy.
#SBATCH --job-name=megarl-gsm8k-tiny
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
here=$(dirname "$0")/..
if [ ! -e "$here/slurm/job.sh" ]; then # Slurm runs a copy of this file
  here=${MEGARL_ROOT:-$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')")/..}
fi
# shellcheck source-path=SCRIPTDIR source=../slurm/job.sh
source "$here/slurm/job.sh"

total=${SLURM_JOB_NUM_NODES:-${MEGARL_NODES:-1}}
job gsm8k_tiny 1 $(((3 + total) / total)) "$@"
[ -n "$word" ] || fail "usage: launch/gsm8k_tiny.sh SOURCE, a folder with GSM8K's train.jsonl and test.jsonl"
data=gsm8k_data
sft=(experiment=gsm8k_tiny_sft trainer.run_dir="${run}_sft")
ppo=(--config-name=ppo_megatron_trainer experiment=gsm8k_tiny trainer.run_dir="$run" trainer.preempt_save_s=50)

echo "== part 1 of 3: GSM8K, a tokenizer and a fresh model"
on_first_node "${MEGARL_PYTHON:-python}" -m megarl.data.prepare gsm8k --source "$word" --out "$data" --tiny-model
check "${ppo[@]}" actor_rollout_ref.model.path="$data/model" actor_rollout_ref.model.init=random "${overrides[@]}"
echo "== part 2 of 3: a warm start on worked answers"
train megarl.main_sft "${sft[@]}"
echo "== part 3 of 3: GRPO, by reward alone"
train megarl.main_ppo "${ppo[@]}" actor_rollout_ref.model.path="${run}_sft/checkpoints/final" "${overrides[@]}"
