"""Reinforcement learning: ``python -m megarl.main_ppo --config-name=ppo_megatron_trainer [overrides]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.checks.run import check_ppo, without_effect
from megarl.config.compose import run_hydra
from megarl.config.programs import PPO
from megarl.config.secrets import without_secrets
from megarl.controller.observer import Observer
from megarl.launchers.engine_placer import engine_placer
from megarl.launchers.ray_devices import find_gpus_of_ray
from megarl.launchers.start import check_launch, dismiss_ranks, end_process, end_rank, serve_if_not_controller
from megarl.monitor.console import stage_line
from megarl.monitor.interrupt import interrupts_told
from megarl.parallel.environment import apply_environment
from megarl.plan.of_run import fitting_plan
from megarl.plan.report import no_effect_text


def main() -> None:
    """Compose, check, start, loop, report."""
    with interrupts_told(end_process):
        if not serve_if_not_controller():
            run_hydra(PPO.config_name, run_ppo, programs=(PPO,))
            end_rank()


def run_ppo(values: Mapping[str, Any], overrides: Sequence[str], observer: Observer | None = None) -> None:
    """Run what resolved config values describe. observer: watches the run."""
    find_gpus_of_ray()
    apply_environment()
    checked = check_ppo(values)
    config = checked.config
    check_launch(config)
    plan = fitting_plan(checked, engine_placer())

    print(stage_line(1, 3, "reading the tokenizer and the prompts"), flush=True)
    # Not before the checks: from here on torch and transformers are loaded.
    from megarl.checks.algorithm_file import load_algorithm_file
    from megarl.controller.inputs import read_ppo_inputs
    from megarl.controller.loop import train
    from megarl.controller.open import open_rewards, open_run, try_rewards
    from megarl.controller.report import final_report
    from megarl.controller.resume import NEVER, find_resumption, is_finished
    from megarl.monitor.disk import write_file
    from megarl.monitor.rundir import run_folder, write_description

    algorithm_file = load_algorithm_file(config)
    inputs = read_ppo_inputs(checked)
    print(stage_line(2, 3, "preparing rewards"), flush=True)
    # Before there is a run folder: they may refuse the user's reward function.
    with open_rewards(config) as rewards:
        try_rewards(rewards, config, inputs)
        path = Path(config.trainer.run_dir).expanduser().absolute()
        may_go_on, model_key = config.trainer.resume != NEVER, "actor_rollout_ref.model.path"
        with run_folder(path, values, overrides, model_key, may_go_on=may_go_on) as run_dir:
            plan = no_effect_text(without_effect(checked, inputs.num_steps)) + plan
            print("\n".join((f"run folder: {run_dir}", plan, *inputs.notes)), flush=True)
            shown = without_secrets(values, overrides)
            resumption = find_resumption(config.trainer, run_dir, shown, overrides, inputs.data)
            if is_finished(resumption, inputs.num_steps, run_dir):
                dismiss_ranks()
                return
            if resumption is not None:
                write_description(run_dir, values, overrides)
            write_file(run_dir / "plan.txt", plan + "\n")
            observer = observer or Observer()
            with open_run(config, inputs, algorithm_file, rewards, run_dir, shown, resumption, observer) as run:
                train(run)
            report = final_report(run.evaluations, run_dir)
            print(report, flush=True)
            write_file(run_dir / "report.txt", report.lstrip() + "\n")


if __name__ == "__main__":
    main()
