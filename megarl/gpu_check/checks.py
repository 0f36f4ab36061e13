"""The checks, in the order in which each relies on those before: what is done, and what it would mean if it fails."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megarl.errors import MegarlError
from megarl.gpu_check.ranks import on_ranks
from megarl.parallel.environment import PlatformName
from megarl.parallel.layout import Layout

if TYPE_CHECKING:
    from megarl.gpu_check.work import Way

# Of a log-prob in float32 against Hugging Face on CPU; Transformer Engine multiplies float32 matrices in TF32.
_LOGPROB, _LOGPROB_TF32 = 1e-3, 5e-2
_GRADIENT = 2e-2  # of a norm, relative: TF32 on CUDA
_MEMORY = 0.1  # of what a sleeping engine is to give back
_RUN_S = 900.0
_DIFFERENCE = "rollout_train/logprob_diff_max"

Needs = Literal["nothing", "cuda", "transformer engine"]


@dataclass(frozen=True)
class Machine:
    """What the checks may use. model: a Hugging Face folder that is measured in place of a tiny one."""

    platform: PlatformName
    num_devices: int
    scratch: Path
    model: Path | None = None

    def lacks(self, check: Check) -> str | None:
        """Return what a check needs and isn't here, in words."""
        if check.needs != "nothing" and self.platform != "cuda":
            return "needs CUDA"
        if check.needs == "transformer engine" and find_spec("transformer_engine") is None:
            return "needs Transformer Engine"
        if check.num_ranks > self.num_devices:
            return f"needs {check.num_ranks} devices, and {self.num_devices} are used"
        return None


@dataclass(frozen=True)
class Found:
    """What a check found. figures: for the table of speeds, by name."""

    is_right: bool
    text: str
    figures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Check:
    """One check. means: what it would mean if it fails."""

    name: str
    means: str
    run: Callable[[Machine], Found]
    num_ranks: int = 1
    needs: Needs = "nothing"


@dataclass(frozen=True)
class Result:
    """What became of a check: ok, FAIL, or skipped with the reason."""

    check: Check
    level: Literal["ok", "FAIL", "skipped"]
    text: str
    figures: tuple[tuple[str, str], ...] = ()


def run_checks(machine: Machine, checks: Sequence[Check]) -> Iterator[Result]:
    """Yield the result of each check as it is there. A failure is a result: the checks after it are run as well."""
    for check in checks:
        lacking = machine.lacks(check)
        if lacking is not None:
            yield Result(check, "skipped", lacking)
            continue
        try:
            found = check.run(machine)
        except MegarlError as error:
            yield Result(check, "FAIL", str(error))
            continue
        yield Result(check, "ok" if found.is_right else "FAIL", found.text, found.figures)


def _write_model(machine: Machine, name: str) -> tuple[Path, int]:
    """Return the folder of a tiny model, and the size of its vocabulary."""
    from megarl.verify.subject import subjects

    (subject,) = (subject for subject in subjects(None) if subject.name == name)
    folder = machine.scratch / name
    return (folder if folder.is_dir() else subject.write(machine.scratch)), subject.shape.vocab_size


def _parity(machine: Machine, *, te: bool) -> Found:
    from megarl.gpu_check.work import logprobs
    from megarl.verify.reference import make_reference

    worst = 0.0
    for name in ("qwen3", "qwen3_moe"):
        folder, vocab_size = _write_model(machine, name)
        reference = make_reference(folder, vocab_size)
        (found_BS,) = on_ranks(machine.scratch / "parity", logprobs, folder, reference.everything, te=te)
        assert found_BS is not None
        worst = max(worst, float((found_BS.cpu() - reference.logprobs_BS).abs().max()))
    allowed = _LOGPROB_TF32 if te and machine.platform == "cuda" else _LOGPROB
    return Found(worst <= allowed, f"log-probs differ from Hugging Face's by up to {worst:.1e} (allowed {allowed:g})")


def _experts(machine: Machine) -> Found:
    from megarl.gpu_check.work import gradient_norm
    from megarl.verify.reference import make_reference

    folder, vocab_size = _write_model(machine, "qwen3_moe")
    batch = make_reference(folder, vocab_size).rollouts
    alone = on_ranks(machine.scratch / "alone", gradient_norm, folder, Layout(1), batch)[0]
    layout = Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True)
    split = on_ranks(machine.scratch / "split", gradient_norm, folder, layout, batch, num_ranks=2)
    text = f"gradient norm {alone:.6g} on one rank, {', '.join(f'{norm:.6g}' for norm in split)} on TP2 EP2"
    return Found(all(math.isclose(norm, alone, rel_tol=_GRADIENT) for norm in split), text)


def _published(machine: Machine) -> Found:
    from megarl.gpu_check.work import answers
    from megarl.verify.reference import greedy
    from megarl.verify.work import GREEDY, prompts

    folder, vocab_size = _write_model(machine, "qwen3")
    expected = greedy(folder, prompts(vocab_size), GREEDY.max_tokens)
    layout = Layout(2, tp=2, sequence_parallel=True)
    found = on_ranks(machine.scratch / "published", answers, folder, layout, 2, num_ranks=2)
    right, total = list(itertools.chain(*expected)), sum(map(len, expected)) * len(found)
    wrong = sum(a != b for rank in found for a, b in zip(itertools.chain(*rank), right, strict=True))
    # Where two tokens are nearly as likely, TF32 may take the other, and all after it differ.
    allowed = total // 4 if machine.platform == "cuda" else 0
    same = all(rank == found[0] for rank in found)
    text = f"{wrong} of {total} greedy tokens aren't Hugging Face's; ranks {'agree' if same else 'disagree'}"
    return Found(same and wrong <= allowed, text)


def _run_of(machine: Machine, launcher: str) -> Found:
    """Train one step with an engine of two ranks, as a user does, and read what the run says of itself."""
    from megarl.data.verbs import prepare_verbs

    data, run = machine.scratch / "verbs", machine.scratch / f"run_{launcher}"
    if not data.is_dir():
        prepare_verbs(data, seed=0)
    on_gpus = machine.platform == "cuda"
    overrides = {
        "data.train_files": f"[{data / 'train.parquet'}]",
        "data.val_files": f"[{data / 'test.parquet'}]",
        "data.train_batch_size": 8,
        "data.val_batch_size": 8,
        "data.max_val_prompts": 8,
        "actor_rollout_ref.model.path": data / "model",
        "actor_rollout_ref.model.init": "random",
        "actor_rollout_ref.model.dtype": "bfloat16" if on_gpus else "float32",
        "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 8,
        "actor_rollout_ref.actor.log_prob_micro_batch_size_per_gpu": 8,
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size": 2,
        "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size": 1,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 2,
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.gpu_memory_utilization": 0.3,
        "trainer.n_gpus_per_node": 2,
        "trainer.total_training_steps": 1,
        "trainer.run_dir": run,
    }
    start = [sys.executable, "-m"]
    if launcher == "torchrun":
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    program = ["megarl.main_ppo", "--config-name=ppo_megatron_trainer", "experiment=quickstart"]
    command = [*start, *program, *(f"{name}={value}" for name, value in overrides.items())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_RUN_S, cwd=machine.scratch)
    except subprocess.TimeoutExpired:
        return Found(False, f"the run isn't done after {_RUN_S:g} s")
    if done.returncode != 0:
        return Found(False, f"the run ended with {done.returncode}: {_reason(done.stderr + done.stdout)}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (difference,) = (row[_DIFFERENCE] for row in rows if _DIFFERENCE in row)
    allowed = 0.5 if on_gpus else _LOGPROB
    text = f"one step; log-probs of engine and trainer differ by up to {difference:.1e} (allowed {allowed:g})"
    return Found(difference <= allowed, text)


def _reason(said: str) -> str:
    """Return the first error that a run tells of, with what follows it; the end of what it says where it names none."""
    lines = said.splitlines()
    first = next((i for i, line in enumerate(lines) if "Error: " in line), None)
    return "\n".join(lines[-20:] if first is None else lines[first : first + 10])


def _slept(machine: Machine) -> Found:
    from megarl.gpu_check.work import slept

    folder, _ = _write_model(machine, "qwen3")
    (found,) = on_ranks(machine.scratch / "slept", slept, folder)
    given, held = found.asleep - found.awake, found.weights_bytes + found.cache_bytes
    taken = found.asleep - found.with_weights
    text = (
        f"asleep it gives back {given:,} bytes of {held:,} in weights and cache, waking the weights takes {taken:,}; "
        f"afterwards it answers {'as before' if found.alike else 'otherwise'}"
    )
    return Found(found.alike and given >= (1 - _MEMORY) * held and taken < given, text)


def _ways(machine: Machine, *, has_experts: bool) -> Iterator[tuple[str, Way, bool]]:
    """Yield the ways to compute that this machine has, by name, and whether each is with Transformer Engine."""
    from megarl.gpu_check.work import Way

    yield "as it is", Way(), True
    if machine.num_devices > 1:
        early = {"overlap_grad_reduce": True, "overlap_param_gather": True}
        yield "two ranks", Way(num_ranks=2), True
        yield "two ranks, exchanged in buckets while passes compute", Way(num_ranks=2, section=early), True
    if machine.platform != "cuda":
        return  # graphs, runners and kernels are CUDA's
    yield "fused head", Way(fused_head=True), True
    yield "reproducible samples", Way(reproducible=True), True
    yield "no CUDA graphs", Way(enforce_eager=True), True
    if find_spec("fused_weight_gradient_mlp_cuda") is not None:
        yield "gradients added up by the product itself", _overriding(gradient_accumulation_fusion=True), True
    if find_spec("transformer_engine") is not None:
        if has_experts:
            fused = _overriding(moe_permute_fusion=True, moe_router_fusion=True)
            yield "fused routing and permutation", fused, True
        yield "without Transformer Engine", Way(), False


def _overriding(**fields: bool) -> Way:
    from megarl.gpu_check.work import Way

    return Way(section={"override_transformer_config": fields})


def _speeds(machine: Machine) -> Found:
    from megarl.gpu_check.work import speeds
    from megarl.verify.reference import make_reference
    from megarl.weights.model_shape import read_model_shape

    tiny, vocab_size = _write_model(machine, "qwen3")
    folder = machine.model or tiny
    shape = read_model_shape(str(folder))
    batch = make_reference(tiny, min(vocab_size, shape.vocab_size)).rollouts
    figures = []
    for name, way, te in _ways(machine, has_experts=bool(shape.num_experts)):
        place = machine.scratch / re.sub(r"\W+", "_", name)
        found = on_ranks(place, speeds, folder, batch, way, num_ranks=way.num_ranks, te=te)[0]
        cells = f"{found.update:,.0f} | {found.rollout:,.0f} | {found.publish_s:.3f}"
        figures.append((name, cells))
    return Found(True, f"{len(figures)} ways measured on {folder.name}", tuple(figures))


CHECKS: tuple[Check, ...] = (
    Check(
        "one device, without Transformer Engine",
        "Megatron's own layers compute something else on this device: nothing after this can be trusted",
        lambda machine: _parity(machine, te=False),
    ),
    Check(
        "one device, with Transformer Engine",
        "its layers, its attention of packed rows or its experts get what they don't expect, or its torch is another",
        lambda machine: _parity(machine, te=True),
        needs="transformer engine",
    ),
    Check(
        "gradient norm of experts, TP2 EP2 against one rank",
        "experts are counted on some tensor-parallel ranks and not on others, so that clipping depends on the layout",
        _experts,
        num_ranks=2,
    ),
    Check(
        "publish and generate on two devices",
        "weights reach the wrong places of the engine, or its ranks don't get the same sums from an all-reduce",
        _published,
        num_ranks=2,
    ),
    Check(
        "a step under torchrun",
        "engine and trainer don't live together in torchrun's processes: see what the run says",
        lambda machine: _run_of(machine, "torchrun"),
        num_ranks=2,
    ),
    Check(
        "a step on Ray",
        "ranks on Ray don't get the devices that Ray gave them, or see too few of their peers'",
        lambda machine: _run_of(machine, "ray"),
        num_ranks=2,
    ),
    Check(
        "sleep and wake, memory read back",
        "memory that the plan counts on for training stays with the engine, or it loses what no publication brings",
        _slept,
        needs="cuda",
    ),
    Check(
        "speed of update, rollout and publication",
        "one of the ways to compute fails here; the others may still be used",
        _speeds,
    ),
)
