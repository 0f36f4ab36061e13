#!/usr/bin/env bash
# Teach a fresh 0.8M-parameter Qwen3 what eight verbs mean, by reward alone: SFT warm start, then GRPO with a
# Megatron actor (TP2 x PP2) and vLLM (TP2, two replicas), on two CPU cores; on two nodes with a TP group in each.
# Usage: launch/quickstart.sh [SEED] [main_ppo overrides], by bash, or by sbatch on 1, 2 or 4 nodes (docs/cluster.md).
# Writes quickstart_data/ and outputs/ in the current folder.
#SBATCH --job-name=megarl-quickstart
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
job quickstart 1 $(((3 + total) / total)) "$@"
seed=${word:-0} data=quickstart_data
sft=(experiment=quickstart_sft trainer.seed="$seed" trainer.run_dir="${run}_sft")
ppo=(--config-name=ppo_megatron_trainer experiment=quickstart trainer.seed="$seed" trainer.run_dir="$run" trainer.preempt_save_s=50)

echo "== part 1 of 3: the task and a fresh model"
on_first_node "${MEGARL_PYTHON:-python}" -m megarl.data.prepare verbs --out "$data" --seed "$seed"
check "${ppo[@]}" actor_rollout_ref.model.path="$data/model" actor_rollout_ref.model.init=random "${overrides[@]}"
echo "== part 2 of 3: a warm start on demonstrations"
train megarl.main_sft "${sft[@]}"
echo "== part 3 of 3: GRPO, by reward alone"
train megarl.main_ppo "${ppo[@]}" actor_rollout_ref.model.path="${run}_sft/checkpoints/final" "${overrides[@]}"
