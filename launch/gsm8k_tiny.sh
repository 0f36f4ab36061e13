#!/usr/bin/env bash
# The real GSM8K through the whole path on two CPU cores: byte-pair tokenizer trained on it, small fresh model, SFT of
# 200 steps, ten steps of GRPO. The model is too small to reason; the reward is for the form of its answers, too.
# Usage: launch/gsm8k_tiny.sh SOURCE [main_ppo overrides]   (SOURCE: a folder with train.jsonl and test.jsonl, or a
# downloaded HF copy)
set -euo pipefail

source=${1:?"usage: launch/gsm8k_tiny.sh SOURCE, a folder with GSM8K's train.jsonl and test.jsonl"}
data=gsm8k_data
run=outputs/gsm8k_tiny_$(date +%Y_%m_%d_%H_%M_%S)

echo "== part 1 of 3: GSM8K, a tokenizer and a fresh model"
python -m megarl.data.prepare gsm8k --source "$source" --out "$data" --tiny-model
echo "== part 2 of 3: a warm start on worked answers"
python -m megarl.main_sft experiment=gsm8k_tiny_sft trainer.run_dir="${run}_sft"
echo "== part 3 of 3: GRPO, by reward alone"
python -m megarl.main_ppo --config-name=ppo_megatron_trainer experiment=gsm8k_tiny trainer.run_dir="$run" \
  actor_rollout_ref.model.path="${run}_sft/checkpoints/final" "${@:2}"
