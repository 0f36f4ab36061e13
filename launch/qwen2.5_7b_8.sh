#!/usr/bin/env bash
# GSM8K with GRPO on Qwen2.5-7B-Instruct, one node of 8 devices.
# Usage: launch/qwen2.5_7b_8.sh SOURCE [main_ppo overrides]   (SOURCE: GSM8K as jsonl or a downloaded HF copy)
set -euo pipefail

source=${1:?"usage: launch/qwen2.5_7b_8.sh SOURCE [overrides]"}

python -m megarl.data.prepare gsm8k --source "$source" --out ~/data/gsm8k
python -m megarl.main_ppo --config-name=ppo_megatron_trainer experiment=qwen2.5_7b_8 trainer.strict=true "${@:2}"
