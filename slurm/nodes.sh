# shellcheck shell=bash disable=SC2154 # job.sh sets what isn't set here
# Sourced by job.sh: the nodes of a Slurm job, one attempt at a run after another until it went to its end.

PREEMPTED=75 NODE_LOST=69 # exit codes of a run that another attempt goes on with

asks_for_gpus() { grep -q '^#SBATCH --gpus-per-node' "$0"; }

# Sets submission, the command that submits the script, as MEGARL_* say.
submission() {
  submission=(sbatch --nodes="$nodes")
  if asks_for_gpus; then submission+=(--gpus-per-node="$devices"); fi
  if [ -n "${MEGARL_ACCOUNT:-}" ]; then submission+=(--account="$MEGARL_ACCOUNT"); fi
  if [ -n "${MEGARL_PARTITION:-}" ]; then submission+=(--partition="$MEGARL_PARTITION"); fi
  if [ -n "${MEGARL_TIME:-}" ]; then submission+=(--time="$MEGARL_TIME"); fi
  # shellcheck disable=SC2206 # several flags in one variable
  submission+=(${MEGARL_SBATCH:-} "$0" "${resubmitted[@]}")
}

# Names nodes, ports and logs of this attempt, and sets aside what the one before left without a checkpoint.
begin_attempt() {
  local folder
  attempt=${SLURM_RESTART_COUNT:-0}
  job=${SLURM_JOB_ID}_$attempt
  logs=${run}_logs/attempt_$attempt
  mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # One task a node has all of it: by default a step would have one core.
  step=(--ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --mem=0)
  if scontrol show config | grep '^TaskPlugin .*affinity' >/dev/null; then step+=(--cpu-bind=none); fi
  MEGARL_JOB_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
  export MEGARL_JOB_TOKEN
  mkdir -p "$logs"
  told=
  trap 'told=1; touch "$logs/preempt"' USR1
  if [ "$attempt" -gt 0 ]; then
    say "attempt $attempt of job $SLURM_JOB_ID on ${names[*]}"
    for folder in "$run" "${run}_sft"; do
      if [ -e "$folder/metrics.jsonl" ] && ! compgen -G "$folder/checkpoints/step_*" >/dev/null; then
        mv "$folder" "$folder.attempt_$((attempt - 1))"
      fi
    done
  fi
}

on_all_nodes() {
  local code=0 python=("${MEGARL_PYTHON:-python}") command start
  if ! in_job; then
    names=() job=JOB logs=${run}_logs step=(--ntasks-per-node=1)
    for ((i = 0; i < nodes; i++)); do names+=("node$i"); done
  fi
  command=(-m megarl.nodes --nodes="$(IFS=,; echo "${names[*]}")" --devices="$devices" --launcher="$launcher"
    --host="$(address)" --port="${MEGARL_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 1200 * 10))}" --job="$job" --logs="$logs"
    --wait-s="${MEGARL_START_S:-300}")
  start=(srun "${step[@]}" --nodes="$nodes" --ntasks="$nodes" --kill-on-bad-exit=0 --wait=60 "${flags[@]}")
  if [ "$mode" = dry-run ]; then
    show "on all nodes" "${start[@]}" "${inside[@]}" "${python[@]}" "${command[@]}" -- "$@"
    if asks_for_gpus; then export MEGARL_PLATFORM=${MEGARL_PLATFORM:-cuda}; fi # of the nodes, not of this machine
    "${python[@]}" "${command[@]}" --dry-run -- "$@"
    return
  fi
  "${start[@]}" "${inside[@]}" "${python[@]}" "${command[@]}" -- "$@" &
  while :; do # a signal ends a wait, not the step
    told='' code=0
    wait $! || code=$?
    [ -n "$told" ] || break
  done
  case $code in
    0) return ;;
    "$PREEMPTED") again "the run was told to end, and has saved" ;;
    "$NODE_LOST") wait_for_slurm && again "a node was lost" ;;
    *) if [ -e "$logs/preempt" ]; then again "the run was told to end, and ended with exit code $code"; fi ;;
  esac
  exit "$code"
}

# Prints the first node's address, by which all others reach it.
address() {
  if ! in_job; then
    echo "${names[0]}"
  elif [ -n "${MEGARL_INTERFACE:-}" ]; then
    srun "${step[@]}" --nodes=1 --ntasks=1 ip -4 -o addr show dev "$MEGARL_INTERFACE" | sed -n 's/.* inet \([0-9.]*\).*/\1/p'
  else
    getent ahostsv4 "${names[0]}" | awk '$1 !~ /^127\./ { print $1; exit }'
  fi
}

# Slurm itself requeues a job whose node is down, and doesn't place it there again, unless its script has ended before.
wait_for_slurm() {
  local timeout_s
  timeout_s=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
  say "waiting ${timeout_s:=300} s and 60 more for Slurm to see that the node is down"
  sleep $((timeout_s + 60))
}

again() {
  if [ "$attempt" -ge "${MEGARL_MAX_RESTARTS:-5}" ]; then
    say "launch: $1; not again: it is attempt $attempt, and MEGARL_MAX_RESTARTS=${MEGARL_MAX_RESTARTS:-5}"
    return
  fi
  say "launch: $1; job $SLURM_JOB_ID is queued again"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    say "launch: the job can't be queued again; submit it anew with MEGARL_RUN=$run"
    return
  fi
  trap '' TERM
  while :; do sleep 1 || :; done # until Slurm ends this script: its own exit code would end the job
}
