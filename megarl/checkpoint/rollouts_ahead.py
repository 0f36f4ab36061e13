"""Rollouts of the next step that were sampled before a checkpoint was saved, as rollouts_ahead.json in it.

Another run of the same step would sample others: the weights that sampled these are older than the checkpoint's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megarl.errors import CheckpointError
from megarl.types import GenerationRequest, Group, Rollout, Sampling

FILE_NAME = "rollouts_ahead.json"


@dataclass(frozen=True)
class RolloutsAhead:
    """Rollouts that aren't trained on yet, with what was asked for them. step: the last that any were asked for.

    groups: those of each request; none where they weren't complete. places: of the requests among all of the run, where
    they aren't all those of the step.
    """

    step: int
    requests: tuple[GenerationRequest, ...]
    sampling: Sampling
    groups: tuple[Group, ...]
    places: tuple[int, ...] = ()


def write_rollouts_ahead(folder: Path, ahead: RolloutsAhead) -> None:
    """Write ``folder``/rollouts_ahead.json. JSON holds the digits that give the same float again."""
    groups = [
        [[r.token_ids, r.logprobs, r.finish_reason, r.policy_version, r.switches] for r in group]
        for group in ahead.groups
    ]
    fields = {
        "step": ahead.step,
        "requests": [[request.token_ids, request.seed] for request in ahead.requests],
        "sampling": asdict(ahead.sampling),
        "groups": groups,
        "places": ahead.places,
    }
    (folder / FILE_NAME).write_text(json.dumps(fields, allow_nan=False) + "\n")


def read_rollouts_ahead(folder: Path) -> RolloutsAhead | None:
    """Return the RolloutsAhead of a checkpoint, None where it has none. Raises CheckpointError for another content."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text())
        groups = tuple(tuple(_rollout(*values) for values in group) for group in fields["groups"])
        requests = tuple(GenerationRequest(tuple(map(int, ids)), int(seed)) for ids, seed in fields["requests"])
        sampling = fields["sampling"]
        stops = tuple(map(int, sampling.pop("stop_token_ids")))
        places = tuple(map(int, fields["places"]))
        return RolloutsAhead(int(fields["step"]), requests, Sampling(**sampling, stop_token_ids=stops), groups, places)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} isn't as it was saved ({error}); take another checkpoint") from error


def _rollout(
    token_ids: list[int],
    logprobs: list[float],
    finish_reason: str,
    policy_version: int,
    switches: list[tuple[int, int]],
) -> Rollout:
    return Rollout(
        tuple(map(int, token_ids)),
        tuple(map(float, logprobs)),
        str(finish_reason),
        int(policy_version),
        tuple((int(index), int(version)) for index, version in switches),
    )
