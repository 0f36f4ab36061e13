"""A reward model's scores are those of Hugging Face's sequence classification model, on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from megarl.batching.pack import sequences_to_batch
from megarl.parallel.layout import Layout
from megarl.types import Batch
from megarl.verify.pool import RankPool, RanksFailed
from tests.dist.reward_model_cases import score
from tests.dist.tiny_models import save_tiny_classifier

MODELS = ("llama-untied", "qwen2-untied", "qwen3-tied", "qwen3_moe-untied")
LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4, 1, 11, 8, 13)
LAYOUTS = {
    "one_rank": Layout(1),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "pp2": Layout(2, pp=2),
    "cp2": Layout(2, cp=2),
    "tp2_pp2": Layout(4, tp=2, pp=2),
    "pp2_vpp2_dp2": Layout(4, pp=2, vpp=2),
    "tp2_cp2+sp": Layout(4, tp=2, cp=2, sequence_parallel=True),
    "ep2_tp2+sp": Layout(4, tp=2, ep=2, sequence_parallel=True),
}
QUICK = {("qwen3-tied", "tp2+sp"), ("qwen3-tied", "cp2"), ("llama-untied", "pp2_vpp2_dp2")}
PAIRS = [
    pytest.param(model, layout, id=f"{model}-{layout}", marks=[] if (model, layout) in QUICK else pytest.mark.long)
    for model in MODELS
    for layout in LAYOUTS
    if (model == "qwen3_moe-untied") == layout.startswith("ep")
]


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Return sequences of which some tokens were sampled; that makes no difference."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 99, (length,), generator=generator).tolist() for length in LENGTHS]
    return sequences_to_batch(tokens, [[i >= 2 for i in range(length)] for length in LENGTHS])


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_a_rollout_s_score_is_what_transformers_makes_of_it_alone(
    ranks: RankPool, tmp_path: Path, batch: Batch, model: str, name: str
) -> None:
    save_tiny_classifier(model, tmp_path, num_hidden_layers=4)
    expected_B, layout = _scores(tmp_path, batch), LAYOUTS[name]
    assert float(expected_B.std()) > 0.1, "the scores differ too little to be told apart"
    answers = ranks.run(score, tmp_path, layout, batch, world_size=layout.world_size)
    for packed in (True, False):
        scores_B = torch.cat([answers[rank][packed] for rank in layout.output_ranks()])
        torch.testing.assert_close(scores_B, expected_B, rtol=0, atol=2e-5)
    silent = set(range(layout.world_size)) - set(layout.output_ranks())
    assert all(answers[rank] == {True: None, False: None} for rank in silent)


def test_a_score_that_is_no_finite_number_ends_the_run(ranks: RankPool, tmp_path: Path, batch: Batch) -> None:
    save_tiny_classifier("llama-untied", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["score.weight"][0, 0] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RanksFailed, match="the reward model gave 12 of 12 rollouts a score that is no finite number"):
        ranks.run(score, tmp_path, Layout(1), batch, world_size=1)


@torch.no_grad()
def _scores(folder: Path, batch: Batch) -> Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = zip(batch.tokens_BS, batch.lengths_B.tolist(), strict=True)
    return torch.cat([model(tokens_S[None, :length]).logits[:, 0] for tokens_S, length in rows])
