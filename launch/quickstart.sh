#!/usr/bin/env bash
# Teach a fresh 0.8M-parameter Qwen3 what eight verbs mean, by reward alone: SFT warm start, then GRPO with a
# Megatron actor (TP2 x PP2) and vLLM (TP2, two replicas), on two CPU cores.
# Usage: launch/quickstart.sh [SEED] [main_ppo overrides]. Writes quickstart_data/ and outputs/ in the current folder.
set -euo pipefail

seed=${1:-0}
data=quickstart_data
run=outputs/quickstart_$(date +%Y_%m_%d_%H_%M_%S)

echo "== part 1 of 3: the task and a fresh model"
python -m megarl.data.prepare verbs --out "$data" --seed "$seed"
echo "== part 2 of 3: a warm start on demonstrations"
python -m megarl.main_sft experiment=quickstart_sft trainer.seed="$seed" trainer.run_dir="${run}_sft"
echo "== part 3 of 3: GRPO, by reward alone"
python -m megarl.main_ppo --config-name=ppo_megatron_trainer experiment=quickstart trainer.seed="$seed" trainer.run_dir="$run" \
  actor_rollout_ref.model.path="${run}_sft/checkpoints/final" "${@:2}"
