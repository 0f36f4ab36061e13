"""Publishing the actor's weights to the engine, and verifying that the engine runs them.

Two things may go wrong. Values change on their way, at any publication: checksums of what was sent and of what has
arrived tell. Or they arrive in the wrong place, or an engine computes another function of them, at every publication
alike: its log-probs tell, after the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from megarl.algorithm.metrics import logprob_difference
from megarl.batching.pack import rollouts_to_batch
from megarl.config.schema import ALWAYS, NEVER
from megarl.controller.engines import Engines
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.errors import PublishError
from megarl.types import GenerationRequest, Prompt, Sampling

# Largest difference between the engine's and the trainer's log-prob of one token after a publish: the two compute the
# same function in another order. Wrong weights differ by several nats.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
_NUM_CHECKED_PROMPTS, _NUM_CHECKED_TOKENS = 8, 16


class Publication:
    """Counts and makes the publications of a run. policy_version: number of the last one, -1 before the first."""

    def __init__(self, engine: Engines, prompts: Sequence[Prompt], max_tokens: int, verify: str) -> None:
        """Publish nothing yet. max_tokens: of a response. verify: first, always or never."""
        self.engine, self.policy_version, self.verify = engine, -1, verify
        self._prompts = list(prompts[:_NUM_CHECKED_PROMPTS])
        self._sampling = Sampling(temperature=0.0, max_tokens=min(_NUM_CHECKED_TOKENS, max_tokens))
        self._is_verified = False

    def publish(self, actor: RoleOnRanks) -> None:
        """Publish the actor's weights. Raises PublishError where that is verified and the engine doesn't run them."""
        self.policy_version += 1
        is_first = not self._is_verified and self.verify != NEVER
        self.engine.publish(self.policy_version, verify=is_first or self.verify == ALWAYS)
        if is_first:
            self._compare_logprobs(actor)
            self._is_verified = True

    def _compare_logprobs(self, actor: RoleOnRanks) -> None:
        """Compare the log-probs of the engine's greedy tokens with those that the trainer gives them."""
        groups = self.engine.generate([GenerationRequest(p.token_ids, 0) for p in self._prompts], self._sampling)
        self.engine.rest()
        batch = rollouts_to_batch([p.token_ids for p in self._prompts], groups)
        trainer_BS = actor.logprobs(batch, temperature=1.0)
        difference = logprob_difference(trainer_BS, batch.rollout_logprobs_BS, batch.mask_BS)
        for whose, logprobs_BS in (("trainer", trainer_BS), ("engine", batch.rollout_logprobs_BS)):
            bad = int((~logprobs_BS.isfinite() & batch.mask_BS.bool()).sum())
            if bad:
                raise PublishError(
                    f"the {whose}'s log-probs of {bad} of {int(batch.mask_BS.sum())} greedy tokens are NaN or infinite"
                    f": {actor.role.model.path} overflows in {actor.role.dtype}. fix: "
                    "actor_rollout_ref.model.dtype=float32, or another model"
                )
        allowed = _TOLERANCE[actor.role.dtype]
        if not difference.max_abs <= allowed:
            raise PublishError(
                f"after publishing, the engine's greedy log-probs differ from the trainer's by up to "
                f"{difference.max_abs:.3g} (allowed {allowed:g}): the engine doesn't run the trainer's weights"
            )
