"""What a run would do, hold and move, before it is launched: ``python -m megarl.plan --config-name=... [overrides]``.

Loads no torch. Takes a second or two on a laptop, whatever the size of the cluster.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megarl.checks.run import CheckedRun, check_ppo
from megarl.config.command_line import FlagParser, end_quietly_with_the_reader, take_flags
from megarl.config.compose import errors_reported, run_hydra
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError, Problem
from megarl.parallel.environment import PlatformName
from megarl.plan.advise import advise
from megarl.plan.changes import device_with_memory, fitting_changes
from megarl.plan.devices import Device, device
from megarl.plan.of_run import known_models, plan_of, planned
from megarl.plan.report import advice_json, advice_text, plan_json, plan_text
from megarl.plan.run_plan import RunPlan

HELP = """\
usage: python -m megarl.plan [--config-name=FILE] [experiment=NAME] [key=value ...]
                             [--device=NAME] [--gpu-memory=GIB] [--gpus=N] [--json] [--advise]

  --device=NAME      what a rank runs on: A100-80, H100, H200, H20, B200, ..., or cpu, this machine; default H100
  --gpu-memory=GIB   its memory, if other than that device's
  --gpus=N           on so many devices, in nodes of trainer.n_gpus_per_node, whatever trainer.nnodes is
  --json             print JSON
  --advise           search layouts and offloads for the model and batch, and rank those that fit

The rest is as for megarl.main_ppo: see python -m megarl.main_ppo --help. Exit code 0 where the run fits, 1 where it
doesn't, 2 for a mistake in the configuration."""
DOES_NOT_FIT = 1


def main() -> None:
    """Compose, check, plan, print."""
    end_quietly_with_the_reader()
    parser = FlagParser()
    parser.add_argument("--device", default="H100")
    parser.add_argument("--gpu-memory", type=float)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--advise", action="store_true")
    with errors_reported():
        flags, rest = take_flags(parser, sys.argv[1:])

    def task(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
        if flags.gpus is not None:
            values = _on(values, flags.gpus)
        platform: PlatformName = "cpu" if flags.device.lower() == "cpu" else "cuda"
        checked = check_ppo(values, files_may_be_missing=True, platform=platform)
        config = checked.config
        place = device_with_memory(device(flags.device, config.trainer.n_gpus_per_node, "--device"), flags.gpu_memory)
        if flags.advise:
            _advise(checked, place, flags.json)
            return
        plan = planned(checked, place)
        changes = None
        if not plan.fits:
            changes = fitting_changes(config, plan, lambda c: plan_of(checked, c, place), known_models(checked))
        if flags.json:
            print(json.dumps(plan_json(plan, changes, checked.notes), indent=1))
        else:
            print(plan_text(plan, changes, checked.notes))
        if not plan.fits:
            sys.exit(DOES_NOT_FIT)

    run_hydra("ppo_megatron_trainer", task, rest, HELP)


def _advise(checked: CheckedRun[PPOConfig], place: Device, as_json: bool) -> None:
    def again(c: PPOConfig) -> RunPlan:
        return plan_of(checked, c, place)

    plan = again(checked.config)
    found, tried = advise(checked.config, checked.actor.shape, again, known_models(checked))
    print(json.dumps(advice_json(found, plan, tried), indent=1) if as_json else advice_text(found, plan, tried))
    if not found:
        sys.exit(DOES_NOT_FIT)


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
