# shellcheck shell=bash
# Sourced by launch/*.sh: a run on this machine, or on the nodes of a Slurm job. docs/cluster.md lists the variables.
#
#   job NAME NODES DEVICES "$@"   reads flags and sizes; sets run (a folder), word (a first argument without =), overrides
#   on_first_node COMMAND ...     once
#   check ARGUMENTS ...           the checks and the plan of a run, once, before it holds any device
#   train MODULE ARGUMENTS ...    the run, on all nodes

# shellcheck source-path=SCRIPTDIR source=nodes.sh
source "$(dirname "${BASH_SOURCE[0]}")/nodes.sh"

say() { echo "$@" >&2; }
fail() { say "launch: $1"; exit 2; }
in_job() { [ -n "${SLURM_JOB_ID:-}" ]; }
show() { printf '%s:' "$1"; printf ' %q' "${@:2}"; echo; }

job() {
  local name=$1 argument
  nodes=${MEGARL_NODES:-$2} devices=${MEGARL_DEVICES:-$3} launcher=${MEGARL_LAUNCHER:-ray}
  shift 3
  mode=run word='' overrides=() resubmitted=()
  for argument; do
    case $argument in
      --plan | --dry-run | --submit) mode=${argument#--} && continue ;;
    esac
    resubmitted+=("$argument")
    # shellcheck disable=SC2034 # the scripts use it
    if [ ${#resubmitted[@]} = 1 ] && [[ $argument =~ ^[^=~+-][^=]*$ ]]; then word=$argument && continue; fi
    overrides+=("$argument")
  done
  MEGARL_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  export MEGARL_ROOT
  if in_job; then nodes=$SLURM_JOB_NUM_NODES; fi
  sizes=(trainer.nnodes="$nodes" trainer.n_gpus_per_node="$devices")
  run=${MEGARL_RUN:-${MEGARL_RUNS:-outputs}/${name}_${SLURM_JOB_ID:-$(date +%Y_%m_%d_%H_%M_%S)}}
  container
  if in_job; then
    if [ "$mode" = submit ]; then fail "--submit within a job"; fi
    begin_attempt
  elif [ "$mode" = run ] && [ "$nodes" -gt 1 ]; then
    fail "$name is for $nodes nodes: bash $0 --submit, or sbatch $0; MEGARL_NODES=1 is for this machine alone"
  elif [ "$mode" = dry-run ]; then
    submission
    show submit "${submission[@]}"
  fi
}

# Sets inside, what a command starts with to be in the container, and flags, what srun needs for that.
container() {
  local image=${MEGARL_IMAGE:-} mounts=$PWD:$PWD${MEGARL_MOUNTS:+,$MEGARL_MOUNTS}
  inside=() flags=()
  case ${MEGARL_CONTAINER:-none} in
    none) return ;;
    pyxis) flags=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    apptainer) inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$image") ;;
    *) fail "MEGARL_CONTAINER=$MEGARL_CONTAINER must be none, pyxis or apptainer" ;;
  esac
  [ -n "$image" ] || fail "MEGARL_CONTAINER=$MEGARL_CONTAINER needs MEGARL_IMAGE, the image"
}

on_first_node() {
  local command=("${inside[@]}" "$@")
  if in_job; then command=(srun "${step[@]}" --nodes=1 --ntasks=1 "${flags[@]}" "${command[@]}"); fi
  if [ "$mode" = dry-run ]; then show once "${command[@]}"; else "${command[@]}"; fi
}

check() {
  local python=("${MEGARL_PYTHON:-python}" -m megarl.plan)
  if [ "$nodes" -gt 1 ]; then # who will start engines that are in processes of their own
    local placer=MEGARL_ENGINE_HOSTS
    [ "$launcher" != ray ] || placer=RAY_ADDRESS
    python=(env "$placer=job" "${python[@]}")
  fi
  if [ "$mode" = dry-run ]; then return; fi
  if in_job; then
    on_first_node "${python[@]}" --here "${sizes[@]}" "$@"
  elif [ "$mode" != run ]; then
    if [ "${MEGARL_CONTAINER:-none}" = pyxis ] && ! "${MEGARL_PYTHON:-python}" -c 'import megarl' 2>/dev/null; then
      say "not checked here: megarl is in the image, which pyxis starts on nodes alone; the job checks before all else"
    else
      "${inside[@]}" "${python[@]}" --device="${MEGARL_DEVICE:-H100}" "${sizes[@]}" "$@"
    fi
    if [ "$mode" = submit ]; then submission && "${submission[@]}"; fi
    exit
  fi
}

train() {
  local module=$1 command
  shift
  command=("${inside[@]}" "${MEGARL_PYTHON:-python}")
  if in_job || [ "$nodes" -gt 1 ]; then
    on_all_nodes "$module" "${sizes[@]}" "$@"
    return
  elif [ "$launcher" = torchrun ]; then
    command+=(-m torch.distributed.run --standalone --nproc-per-node="$devices")
  fi
  command+=(-m "$module" "${sizes[@]}" "$@")
  if [ "$mode" = dry-run ]; then show here "${command[@]}"; else "${command[@]}"; fi
}
