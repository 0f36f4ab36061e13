"""Supervised fine-tuning: ``python -m megarl.main_sft --config-name=sft_trainer [overrides]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.checks.run import check_sft, without_effect
from megarl.config.compose import run_hydra
from megarl.config.programs import SFT
from megarl.config.secrets import without_secrets
from megarl.launchers.ray_devices import find_gpus_of_ray
from megarl.launchers.start import check_launch, dismiss_ranks, end_process, end_rank, serve_if_not_controller
from megarl.monitor.console import stage_line
from megarl.monitor.interrupt import interrupts_told
from megarl.parallel.environment import apply_environment
from megarl.plan.of_run import plan_here
from megarl.plan.report import no_effect_text


def main() -> None:
    """Compose, check, start, loop, report."""
    with interrupts_told(end_process):
        if not serve_if_not_controller():
            run_hydra(SFT.config_name, run_sft, programs=(SFT,))
            end_rank()


def run_sft(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Run what resolved config values describe."""
    find_gpus_of_ray()
    apply_environment()
    checked = check_sft(values)
    config = checked.config
    check_launch(config)

    print(stage_line(1, 2, "reading the tokenizer and the examples"), flush=True)
    # Not before the checks: from here on torch and transformers are loaded.
    from megarl.controller.inputs import read_sft_inputs
    from megarl.controller.loop import train
    from megarl.controller.open import open_sft_run
    from megarl.controller.report import final_report
    from megarl.controller.resume import NEVER, find_resumption, is_finished
    from megarl.monitor.disk import write_file
    from megarl.monitor.rundir import run_folder, write_description

    inputs = read_sft_inputs(checked)
    plan = no_effect_text(without_effect(checked, inputs.num_steps)) + plan_here(checked)
    path, may_go_on = Path(config.trainer.run_dir).expanduser().absolute(), config.trainer.resume != NEVER
    with run_folder(path, values, overrides, "model.path", may_go_on=may_go_on) as run_dir:
        print("\n".join((f"run folder: {run_dir}", plan, *inputs.notes)), flush=True)
        shown = without_secrets(values, overrides)
        resumption = find_resumption(config.trainer, run_dir, shown, overrides, inputs.data)
        if is_finished(resumption, inputs.num_steps, run_dir):
            dismiss_ranks()
            return
        if resumption is not None:
            write_description(run_dir, values, overrides)
        write_file(run_dir / "plan.txt", plan + "\n")
        with open_sft_run(config, inputs, run_dir, shown, resumption) as run:
            train(run)
        report = final_report(run.evaluations, run_dir)
        print(report, flush=True)
        write_file(run_dir / "report.txt", report.lstrip() + "\n")


if __name__ == "__main__":
    main()
