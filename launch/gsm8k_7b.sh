#!/usr/bin/env bash
# GSM8K with GRPO on Qwen2.5-7B-Instruct, one node of 8 devices.
# Usage: launch/gsm8k_7b.sh SOURCE [main_ppo overrides]   (SOURCE: GSM8K as jsonl or a downloaded HF copy)
set -euo pipefail

source=${1:?"usage: launch/gsm8k_7b.sh SOURCE [overrides]"}

python -m megarl.data.prepare gsm8k --source "$source" --out ~/data/gsm8k
python -m megarl.main_ppo --config-name=ppo_megatron_trainer experiment=gsm8k_7b "${@:2}"
