"""What a run would do, hold and move, before it is launched: ``python -m megarl.plan --config-name=... [overrides]``.

Loads no torch. Takes a second or two on a laptop, whatever the size of the cluster.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from megarl.checks.run import CheckedRun, check_ppo, check_sft, without_effect
from megarl.config.command_line import FlagParser, end_quietly_with_the_reader, take_flags
from megarl.config.compose import errors_reported, run_hydra
from megarl.config.programs import PPO, SFT, Program, program_of
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.errors import Absent, ConfigError, Problem
from megarl.launchers.engine_placer import engine_placer
from megarl.parallel.environment import PlatformName, platform_name
from megarl.plan.advise import advise
from megarl.plan.changes import device_with_memory
from megarl.plan.devices import Device, device, this_device
from megarl.plan.engine_place import EnginePlacer, engine_place, processes_per_node
from megarl.plan.kuberay import kuberay_manifest
from megarl.plan.of_run import known_models, plan_of, planned
from megarl.plan.report import advice_json, advice_text, no_effect_text, plan_json, plan_text
from megarl.plan.run_plan import RunPlan
from megarl.plan.verdict import verdict_on

HELP = """\
usage: python -m megarl.plan [--config-name=FILE] [experiment=NAME] [key=value ...]
                             [--device=NAME] [--gpu-memory=GIB] [--gpus=N] [--here]
                             [--json] [--advise] [--kuberay=IMAGE]

  --device=NAME      what a rank runs on: A100-80, H100, H200, H20, B200, ..., or cpu, this machine; default H100
  --gpu-memory=GIB   its memory, if other than that device's
  --gpus=N           on so many devices, in nodes of trainer.n_gpus_per_node, whatever trainer.nnodes is
  --here             as a run on this machine checks itself: on its devices, and with all files there
  --json             print JSON
  --kuberay=IMAGE    print a RayJob of KubeRay in place of a plan that fits, and the plan of one that doesn't
  --advise           search layouts and offloads for the model and batch, and rank those that fit

The rest is as for megarl.main_ppo: see python -m megarl.main_ppo --help. Exit code 0 where the run fits, 1 where it
doesn't, 2 for a mistake in the configuration. A recipe of megarl.main_sft is planned as what it is.

recipes:
{recipes}"""
DOES_NOT_FIT = 1
_DEVICE = "H100"
C = TypeVar("C", PPOConfig, SFTConfig)


def main() -> None:
    """Compose, check, plan, print."""
    end_quietly_with_the_reader()
    parser = FlagParser()
    parser.add_argument("--device")
    parser.add_argument("--gpu-memory", type=float)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--kuberay")
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--advise", action="store_true")
    with errors_reported():
        flags, rest = take_flags(parser, sys.argv[1:])
        if flags.kuberay is not None and (flags.json or flags.advise or flags.here):
            raise ConfigError(
                [Problem("--kuberay", flags.kuberay, "prints a manifest and nothing else", "leave it out")]
            )
        if flags.here and flags.device is not None:
            raise ConfigError([Problem("--device", flags.device, "--here asks for this machine's", "leave one out")])

    def task(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
        if flags.gpus is not None:
            values = _on(values, flags.gpus)
        name = flags.device or _DEVICE
        platform: PlatformName = "cpu" if name.lower() == "cpu" else "cuda"
        if flags.here:
            platform = platform_name()
        if program_of(values) is SFT:
            if flags.advise:
                raise ConfigError(
                    [Problem("--advise", Absent(), "searches layouts of an RL run alone", "leave it out")]
                )
            of_sft = check_sft(values, files_may_be_missing=not flags.here, platform=platform)
            placer = EnginePlacer.COMMAND
            place = _place(of_sft.config, placer, None if flags.here else name, flags.gpu_memory)
            if flags.kuberay is not None:
                _kuberay(of_sft, place, placer, SFT, rest, flags.kuberay)
            else:
                _plan(of_sft, place, placer, flags.json, flags.here)
            return
        checked = check_ppo(values, files_may_be_missing=not flags.here, platform=platform)
        # Pods of a manifest have the devices of ranks or of engines, and no more.
        placer = engine_placer() if flags.kuberay is None else EnginePlacer.HOSTS
        place = _place(checked.config, placer, None if flags.here else name, flags.gpu_memory)
        if flags.kuberay is not None:
            _kuberay(checked, place, placer, PPO, rest, flags.kuberay)
        elif flags.advise:
            _advise(checked, place, flags.json)
        else:
            _plan(checked, place, placer, flags.json, flags.here and not checked.config.trainer.plan_must_fit)

    run_hydra(PPO.config_name, task, rest, HELP)


def _place(config: PPOConfig | SFTConfig, placer: EnginePlacer, name: str | None, gpu_memory: float | None) -> Device:
    """Return the device of a rank: by name, this machine's where it is None."""
    ranks = processes_per_node(config, engine_place(config, placer))
    return device_with_memory(this_device(ranks) if name is None else device(name, ranks, "--device"), gpu_memory)


def _plan(checked: CheckedRun[C], place: Device, placer: EnginePlacer, as_json: bool, may_lack: bool) -> None:
    """Print the plan; exit with a code where it doesn't fit, unless it ``may_lack`` memory and starts all the same."""
    plan = planned(checked, place, placer)
    verdict = None
    if not plan.fits:
        verdict = verdict_on(checked.config, plan, lambda c: plan_of(checked, c, place), known_models(checked))
    idle = without_effect(checked, checked.num_steps)
    if as_json:
        print(json.dumps(plan_json(plan, verdict, checked.notes, idle), indent=1))
    else:
        print(no_effect_text(idle) + plan_text(plan, verdict, checked.notes))
    if not plan.fits and not may_lack:
        sys.exit(DOES_NOT_FIT)


def _kuberay(
    checked: CheckedRun[C], place: Device, placer: EnginePlacer, program: Program, arguments: Sequence[str], image: str
) -> None:
    """Print the manifest of a run that fits."""
    plan = planned(checked, place, placer)
    if plan.fits:
        print(kuberay_manifest(plan, program.name, arguments, image), end="")
    else:
        _plan(checked, place, placer, as_json=False, may_lack=False)


def _advise(checked: CheckedRun[PPOConfig], place: Device, as_json: bool) -> None:
    def again(c: PPOConfig) -> RunPlan:
        return plan_of(checked, c, place)

    plan = again(checked.config)
    found, tried = advise(checked.config, checked.actor.shape, again, known_models(checked), _show_progress)
    print(json.dumps(advice_json(found, plan, tried), indent=1) if as_json else advice_text(found, plan, tried))
    if not found:
        sys.exit(DOES_NOT_FIT)


def _show_progress(done: int, total: int) -> None:
    """Show on stderr how far the search is: in place on a terminal, a line now and then in a log."""
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} layouts", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done % 500 == 0:
        print(f"{done:,} of {total:,} layouts", file=sys.stderr, flush=True)


def _on(values: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """Return ``values`` for so many devices, in full nodes or one that is smaller."""
    trainer = values.get("trainer")
    node = trainer.get("n_gpus_per_node") if isinstance(trainer, Mapping) else None
    if type(node) is not int or node < 1:
        return dict(values)  # for the checks to report
    assert isinstance(trainer, Mapping)
    if gpus < 1 or (gpus > node and gpus % node):
        allowed = f"must be from 1 to trainer.n_gpus_per_node = {node}, or a multiple of it"
        raise ConfigError([Problem("--gpus", gpus, allowed, f"--gpus={max(1, gpus // node) * node}")])
    node = min(gpus, node)
    return {**values, "trainer": {**trainer, "n_gpus_per_node": node, "nnodes": gpus // node}}


if __name__ == "__main__":
    main()
