"""A reward model's scores are those of Hugging Face's sequence classification model, on every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train.reward_model import RewardModel
from megarl.types import Sequences
from megarl.verify.pool import RankPool, RanksFailed
from megarl.verify.reference import random_sequences
from megarl.verify.roles import role_on
from megarl.verify.work import backend_on_rank, score
from tests.dist.parity import ask
from tests.dist.tiny_models import VOCAB_SIZE, save_tiny_classifier

MODELS = ("llama-untied", "qwen2-untied", "qwen3-tied", "qwen3_moe-untied")
# Outside of the name map, on FSDP alone; the last attends in a way of its own, over whole sequences.
OTHER_MODELS = ("gemma2-tied", "gemma3-tied", "phi3-untied", "gpt2-tied", "bloom-tied")
LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4, 1, 11, 8, 13)
LAYOUTS = {
    "one_rank": Layout(1),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "pp2": Layout(2, pp=2),
    "cp2": Layout(2, cp=2),
    "tp2_pp2": Layout(4, tp=2, pp=2),
    "pp2_vpp2_dp2": Layout(4, pp=2, vpp=2),
    "tp2_cp2+sp": Layout(4, tp=2, cp=2, sequence_parallel=True),
    "fsdp4": Layout(4, fsdp=4),
    "fsdp2_ulysses2": Layout(2, cp=2, fsdp=2),
    "ep2_tp2+sp": Layout(4, tp=2, ep=2, sequence_parallel=True),
}
QUICK = {
    ("qwen2-untied", "fsdp2_ulysses2"),
    ("llama-untied", "fsdp4"),
    ("qwen3-tied", "tp2+sp"),
    ("qwen3-tied", "cp2"),
    ("llama-untied", "pp2_vpp2_dp2"),
    ("gemma2-tied", "fsdp2_ulysses2"),
    ("gpt2-tied", "fsdp4"),
}


def _may_have(model: str, layout: str) -> bool:
    if model in OTHER_MODELS:
        return layout == "fsdp4" or (layout == "fsdp2_ulysses2" and model != "bloom-tied")
    return (model == "qwen3_moe-untied") == layout.startswith("ep")


PAIRS = [
    pytest.param(model, layout, id=f"{model}-{layout}", marks=[] if (model, layout) in QUICK else pytest.mark.long)
    for model in (*MODELS, *OTHER_MODELS)
    for layout in LAYOUTS
    if _may_have(model, layout)
]


@pytest.fixture(scope="module")
def batch() -> Sequences:
    """Return sequences of which some tokens were sampled; that makes no difference."""
    return random_sequences(LENGTHS, VOCAB_SIZE, torch.Generator().manual_seed(1))


def _score(role: Role, batch: Sequences) -> dict[bool, Tensor | None]:
    """Return this data-parallel rank's scores, packed where that can be and padded, on the rank that reports them."""
    ways = (False,) if role.shape.own_attention else (True, False)
    return {packed: score(RewardModel(backend_on_rank(replace(role, packed=packed))), batch) for packed in ways}


def _role(layout: Layout, folder: Path) -> Role:
    """Return the role, whose parameters wait on the host between uses."""
    return role_on(layout, folder, "reward_model", param_offload=True)


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_a_rollout_s_score_is_what_transformers_makes_of_it_alone(
    ranks: RankPool, tmp_path: Path, batch: Sequences, model: str, name: str
) -> None:
    save_tiny_classifier(model, tmp_path, num_hidden_layers=4 if model in MODELS else 2)
    expected_B, layout = _scores(tmp_path, batch), LAYOUTS[name]
    assert float(expected_B.std()) > 0.05, "the scores differ too little to be told apart"
    answers = ask(ranks, _score, _role(layout, tmp_path), batch)
    assert (True in answers[0]) == (model != "bloom-tied")
    for packed in answers[0]:
        scores_B = torch.cat([answers[rank][packed] for rank in layout.output_ranks()])
        torch.testing.assert_close(scores_B, expected_B, rtol=0, atol=2e-5)
    silent = set(range(layout.world_size)) - set(layout.output_ranks())
    assert all(told is None for rank in silent for told in answers[rank].values())


def test_a_score_that_is_no_finite_number_ends_the_run(ranks: RankPool, tmp_path: Path, batch: Sequences) -> None:
    save_tiny_classifier("llama-untied", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["score.weight"].fill_(3e38)  # finite, unlike what is made of it
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RanksFailed, match="the reward model gave 12 of 12 rollouts a score that is no finite number"):
        ask(ranks, _score, _role(Layout(1), tmp_path), batch)


@torch.no_grad()
def _scores(folder: Path, batch: Sequences) -> Tensor:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.config.pad_token_id = None  # which may be the last token
    rows = zip(batch.tokens_BS, batch.lengths_B.tolist(), strict=True)
    return torch.cat([model(tokens_S[None, :length]).logits[:, 0] for tokens_S, length in rows])
