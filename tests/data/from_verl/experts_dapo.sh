#!/usr/bin/env bash
# DAPO of a model with experts, as verl's newer scripts are written: arrays, defaults, arithmetic, a test, a case.
set -euo pipefail

NNODES=${NNODES:-2}
MODEL_PATH=${MODEL_PATH:-"Qwen/Qwen3-30B-A3B"}
ENGINE=${ENGINE:-vllm}
max_prompt_length=$((1024 * 2))
max_response_length=$((1024 * 8))
longest=$(((max_prompt_length + max_response_length) * 2)) # twice the longest rollout
COMMON_TP=${COMMON_TP:-2}
ACTOR_TP=${ACTOR_TP:-$COMMON_TP}
ACTOR_VPP=null
offload=True

[ "${ACTOR_TP}" -gt 4 ] && ep=4 || ep=8
case "${ENGINE}" in
    sglang | trtllm) utilization=0.5 ;;
    *)
        utilization=0.6
        ;;
esac

DATA=(
    data.train_files="${HOME}/data/dapo.parquet"
    data.val_files=${HOME}/data/aime.parquet # isn't cut, whatever truncation says
    data.truncation=left
    data.max_prompt_length=${max_prompt_length}
    data.max_response_length=${max_response_length}
    data.train_batch_size=512
)
ACTOR=(
    actor_rollout_ref.model.path="$MODEL_PATH"
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=${longest}
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.kl_loss_coef=0.0
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.policy_loss.loss_mode=gspo
    actor_rollout_ref.actor.optim.lr_warmup_steps=10
    +actor_rollout_ref.actor.optim.override_optimizer_config.optimizer_cpu_offload=True
    +actor_rollout_ref.actor.optim.override_optimizer_config.use_precision_aware_optimizer=True
    actor_rollout_ref.actor.megatron.optimizer_offload=${offload}
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size=${ACTOR_TP}
    actor_rollout_ref.actor.megatron.expert_model_parallel_size=${ep}
    actor_rollout_ref.actor.megatron.expert_tensor_parallel_size=1
    actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size=${ACTOR_VPP}
    +actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full
    +actor_rollout_ref.actor.megatron.override_transformer_config.recompute_method=uniform
    +actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers=1
    +actor_rollout_ref.actor.megatron.override_transformer_config.persist_layer_norm=True
)
EXTRA=(
    model_engine=megatron
)
if [ -n "${MCORE_MODEL_PATH:-}" ]; then
    EXTRA+=(actor_rollout_ref.actor.megatron.dist_checkpointing_path=${MCORE_MODEL_PATH})
fi
LAUNCH=(python3)
if [ "${VERL_USE_UV:-1}" != 0 ]; then
    LAUNCH=(uv run --frozen python3)
fi

"${LAUNCH[@]}" -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    algorithm.rollout_correction.rollout_is=token \
    "${DATA[@]}" \
    "${ACTOR[@]}" \
    actor_rollout_ref.rollout.name=${ENGINE} \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.top_k=-1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=${utilization} \
    actor_rollout_ref.rollout.tensor_model_parallel_size=4 \
    actor_rollout_ref.rollout.calculate_log_probs=True \
    reward_model.reward_manager=dapo \
    +reward_model.reward_kwargs.overlong_buffer_cfg.enable=True \
    +reward_model.reward_kwargs.overlong_buffer_cfg.len=$((1024 * 4)) \
    +reward_model.reward_kwargs.max_resp_len=${max_response_length} \
    trainer.nnodes="${NNODES}" \
    trainer.experiment_name=run_$(date +%Y%m%d) \
    trainer.resume_mode=auto \
    trainer.default_hdfs_dir=hdfs://saves \
    "${EXTRA[@]}" \
    "$@" 2>&1 | tee run.log
