from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarl.algorithm.rollout_correction import (
    Correction,
    CorrectionSettings,
    Rejection,
    correct_rollouts,
    criteria,
    presets,
    update_factors,
)
from megarl.catalog import CORRECTION_PRESETS
from megarl.errors import ConfigError
from tests.unit import numpy_rollout_correction as reference
from tests.unit.numpy_reference import Bools, Floats

SHAPES = [(1, 1), (8, 1), (1, 9), (9, 7)]
REJECTIONS = [
    (),
    (Rejection("token", 0.7, 1.4),),
    (Rejection("sequence", 0.5, 2.0),),
    (Rejection("geometric", 0.9, 1.1), Rejection("worst_token", low=0.6)),
    (Rejection("sequence_k3", high=0.05),),
]


def _columns(seed: int, shape: tuple[int, int]) -> tuple[Floats, Floats, Bools]:
    """Return log-probs by trainer and engine, and a mask with holes, with rows of no token; noise outside the mask."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.7
    mask[rng.random(shape[0]) < 0.15] = False
    rollout = -3 * rng.random(shape)
    return np.where(mask, rollout + 0.3 * rng.normal(size=shape), 7.0), rollout, mask


def _correct(columns: tuple[Floats, Floats, Bools], given_settings: CorrectionSettings) -> Correction:
    return correct_rollouts(*(torch.from_numpy(c) for c in columns), given_settings)


def _with_log_ratios(log_ratios: list[list[float]], given_settings: CorrectionSettings) -> Correction:
    shape = (len(log_ratios), len(log_ratios[0]))
    return _correct((np.array(log_ratios), np.zeros(shape), np.ones(shape, dtype=np.bool_)), given_settings)


@pytest.mark.parametrize("rejections", REJECTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bounds", [(math.inf, (0.0, math.inf)), (1.5, (0.0, math.inf)), (math.inf, (0.8, 1.5))])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_mask_equal_the_reference(
    shape: tuple[int, int],
    bounds: tuple[float, tuple[float, float]],
    normalize: bool,
    level: str,
    rejections: tuple[Rejection, ...],
) -> None:
    columns = _columns(sum(shape), shape)
    result = _correct(columns, CorrectionSettings(level, bounds[0], bounds[1], normalize, rejections))
    left = reference.mask_after(*columns, [(r.criterion, r.low, r.high) for r in rejections])
    expected = reference.weights(*columns, left, level, *bounds, normalize)
    np.testing.assert_array_equal(result.mask_BS.numpy(), left)
    assert result.weights_BS is not None
    np.testing.assert_allclose(result.weights_BS.numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_the_reference(seed: int) -> None:
    columns = _columns(seed, (9, 30))
    given_settings = CorrectionSettings("token", cap=1.2, rejections=(Rejection("geometric", 0.95, 1.05),))
    result, metrics = _correct(columns, given_settings), _correct(columns, given_settings).metrics
    old, rollout, mask = columns
    difference = (old - rollout)[mask]
    ratio, left = np.exp(difference), result.mask_BS.numpy()
    assert result.weights_BS is not None
    expected = {
        "kl": -difference.mean(),
        "kl_k3": (ratio - 1 - difference).mean(),
        "ratio_ess": reference.effective_share(ratio.tolist()),
        **{f"ratio_q{q:02d}": np.quantile(ratio, q / 100, method="lower") for q in (1, 50, 99)},
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "share_masked": 1 - left.sum() / mask.sum(),
        "share_sequences_masked": 1 - left.any(1).sum() / mask.any(1).sum(),
        "weight_mean": np.minimum(np.exp(old - rollout), 1.2)[left].mean(),
        "weight_ess": reference.effective_share(result.weights_BS.numpy()[left].tolist()),
        "share_truncated": (np.exp(old - rollout)[left] > 1.2).mean(),
        "share_outside_band": 0.0,
    }
    assert dict(metrics) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_without_a_level_there_are_no_weights_and_all_tokens_stay() -> None:
    columns = _columns(1, (6, 5))
    result = _correct(columns, presets.get("metrics_only"))
    assert result.weights_BS is None
    np.testing.assert_array_equal(result.mask_BS.numpy(), columns[2])
    assert result.metrics["share_masked"] == 0.0


@pytest.mark.parametrize("name", presets.names())
def test_an_engine_that_agrees_with_the_trainer_is_left_alone_by_every_preset(name: str) -> None:
    _, rollout, mask = _columns(2, (6, 5))
    result = _correct((rollout, rollout.copy(), mask), presets.get(name))
    np.testing.assert_array_equal(result.mask_BS.numpy(), mask)
    assert result.weights_BS is None or torch.equal(result.weights_BS, result.mask_BS.double())
    assert result.metrics["kl"] == 0.0
    assert result.metrics["ratio_ess"] == 1.0


def test_truncation_caps_and_a_band_zeroes_but_keeps_the_token() -> None:
    log_ratios = [[math.log(r) for r in (0.1, 0.6, 1.0, 4.0, 9.0)]]
    capped = _with_log_ratios(log_ratios, presets.get("token_tis"))
    banded = _with_log_ratios(log_ratios, presets.get("icepop"))
    assert capped.weights_BS is not None and banded.weights_BS is not None
    assert capped.weights_BS.tolist() == [pytest.approx([0.1, 0.6, 1.0, 2.0, 2.0])]
    assert banded.weights_BS.tolist() == [pytest.approx([0.0, 0.6, 1.0, 4.0, 0.0])]
    assert banded.mask_BS.all()
    assert banded.metrics["share_outside_band"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("rejection", "left"),
    [
        (Rejection("token", 0.5, 2.0), [[True, False], [True, True], [False, False]]),
        (Rejection("sequence", 0.5, 2.0), [[False, False], [False, False], [True, True]]),
        (Rejection("geometric", 0.5, 2.0), [[False, False], [True, True], [True, True]]),
        (Rejection("sequence_k3", high=0.2), [[False, False], [True, True], [False, False]]),
        (Rejection("worst_token", low=0.01), [[True, True], [True, True], [False, False]]),
    ],
)
def test_criteria_differ_in_what_they_forgive(rejection: Rejection, left: list[list[bool]]) -> None:
    log_ratios = [[0.0, 2.0], [0.5, 0.5], [-5.0, 5.0]]  # one wild token; evenly off; deviations that cancel
    result = _with_log_ratios(log_ratios, CorrectionSettings(rejections=(rejection,)))
    assert result.mask_BS.tolist() == left


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_normalized_weights_have_a_mean_of_one(level: str) -> None:
    columns = _columns(3, (9, 7))
    result = _correct(columns, CorrectionSettings(level, cap=1.3, normalize=True))
    assert result.weights_BS is not None
    of_tokens = result.weights_BS[result.mask_BS]
    of_sequences = torch.stack([w[m][0] for w, m in zip(result.weights_BS, result.mask_BS, strict=True) if m.any()])
    assert (of_tokens if level == "token" else of_sequences).mean().item() == pytest.approx(1.0)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(presets.names()), normalize=st.booleans())
def test_the_order_of_rows_and_padding_change_nothing(seed: int, name: str, normalize: bool) -> None:
    old, rollout, mask = _columns(seed, (6, 5))
    given_settings = replace(presets.get(name), normalize=normalize)
    order = np.random.default_rng(seed).permutation(6)
    padded = tuple(np.pad(c[order], ((0, 0), (1, 2))) for c in (old, rollout, mask))
    expected, result = _correct((old, rollout, mask), given_settings), _correct(padded, given_settings)
    assert torch.equal(result.mask_BS[:, 1:-2], expected.mask_BS[order])
    assert dict(result.metrics) == pytest.approx(dict(expected.metrics), rel=1e-9, abs=1e-9)
    if expected.weights_BS is not None:
        assert result.weights_BS is not None
        torch.testing.assert_close(result.weights_BS[:, 1:-2], expected.weights_BS[order], rtol=1e-9, atol=1e-9)


def test_weights_keep_the_dtype_and_carry_no_gradient() -> None:
    old_BS = torch.zeros(2, 3, requires_grad=True)
    mask_BS = torch.ones(2, 3, dtype=torch.bool)
    result = correct_rollouts(old_BS.detach(), torch.full((2, 3), -0.1), mask_BS, presets.get("token_tis"))
    assert result.weights_BS is not None
    assert (result.weights_BS.dtype, result.weights_BS.requires_grad) == (torch.float32, False)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_wild_ratio_gives_a_finite_weight_and_shows_in_the_metrics(level: str) -> None:
    result = _with_log_ratios([[1e4, 0.0]], CorrectionSettings(level))
    assert result.weights_BS is not None
    assert result.weights_BS.isfinite().all()
    assert result.metrics["ratio_max"] == math.inf


@pytest.mark.parametrize("name", criteria.names())
def test_a_nan_is_rejected_by_every_criterion(name: str) -> None:
    result = _with_log_ratios(
        [[math.nan, 0.0], [0.0, 0.0]], CorrectionSettings(rejections=(Rejection(name, 0.0, 9.0),))
    )
    assert result.mask_BS.tolist() == [[False, name == "token"], [True, True]]
    assert math.isnan(result.metrics["kl"])


def test_when_all_is_rejected_nothing_is_left_and_no_number_is_nan() -> None:
    everything = CorrectionSettings("token", normalize=True, rejections=(Rejection("token", 5.0, 6.0),))
    result = _with_log_ratios([[0.1, 0.2]], everything)
    assert not result.mask_BS.any()
    assert result.weights_BS is not None and not result.weights_BS.any()
    assert not any(math.isnan(value) for value in result.metrics.values())
    assert result.metrics["share_masked"] == 1.0


def test_a_step_without_tokens_gives_no_nan() -> None:
    nothing = np.zeros((2, 3), dtype=np.bool_)
    result = _correct((np.zeros((2, 3)), np.zeros((2, 3)), nothing), presets.get("geometric_token_tis"))
    assert not any(math.isnan(value) for value in result.metrics.values())
    # Where nothing was compared, nothing differs.
    assert {result.metrics[f"ratio_{name}"] for name in ("min", "q01", "q50", "q99", "max")} == {1.0}
    assert (result.metrics["kl"], result.metrics["kl_k3"]) == (0.0, 0.0)


def test_unknown_presets_and_criteria_are_errors_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"preset = 'token_is'.*\n.*did you mean 'token_tis'"):
        presets.get("token_is")
    with pytest.raises(ConfigError, match="did you mean 'geometric'"):
        _with_log_ratios([[0.0]], CorrectionSettings(rejections=(Rejection("geometri"),)))


TOKEN_TRUNCATED, SEQUENCE_TRUNCATED = [2.0, 1.0, 1.0, 1.0], [2.0] * 4


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("metrics_only", None),
        ("token_tis", TOKEN_TRUNCATED),
        ("sequence_tis", SEQUENCE_TRUNCATED),
        ("icepop", [3.0, 1.0, 1.0, 1.0]),
        ("geometric", None),
        ("geometric_token_tis", TOKEN_TRUNCATED),
        ("geometric_sequence_tis", SEQUENCE_TRUNCATED),
        ("k3", None),
        ("k3_token_tis", TOKEN_TRUNCATED),
        ("k3_sequence_tis", SEQUENCE_TRUNCATED),
        ("sequence_mis", SEQUENCE_TRUNCATED),
    ],
)
def test_a_preset_weighs_tokens_or_sequences_up_to_twice_and_icepop_those_in_its_band(
    name: str, weights: list[float] | None
) -> None:
    """One of four tokens is three times as likely to the trainer; each preset's rejections are left out."""
    result = _with_log_ratios([[math.log(3.0), 0.0, 0.0, 0.0]], replace(presets.get(name), rejections=()))
    assert (None if result.weights_BS is None else result.weights_BS[0].tolist()) == (
        None if weights is None else pytest.approx(weights)
    )


def test_icepop_keeps_weights_from_a_half_to_five() -> None:
    ratios = [0.49, 0.51, 4.9, 5.1]
    result = _with_log_ratios([[math.log(ratio) for ratio in ratios]], presets.get("icepop"))
    assert result.weights_BS is not None and result.weights_BS[0].tolist() == pytest.approx([0.0, 0.51, 4.9, 0.0])


@pytest.mark.parametrize(
    ("name", "ratios", "is_left"),
    [
        # The geometric mean of a sequence's ratios is within a thousandth of 1.
        ("geometric", [1.0009, 1.0009], True),
        ("geometric", [1.0011, 1.0011], False),
        ("geometric", [0.9991, 0.9991], True),
        ("geometric", [0.9989, 0.9989], False),
        ("geometric", [1.5, 1 / 1.5], True),  # they cancel
        # A token's mean of r - 1 - log r is a hundredth at most.
        ("k3", [1.14, 1.14], True),  # 0.0090 each
        ("k3", [1.16, 1.16], False),  # 0.0116 each
        ("k3", [1.5, 1 / 1.5], False),  # they don't
        # A sequence is half to twice as likely.
        ("sequence_mis", [1.4, 1.4], True),
        ("sequence_mis", [1.5, 1.5], False),
        ("sequence_mis", [0.72, 0.72], True),
        ("sequence_mis", [0.7, 0.7], False),
        ("token_tis", [9.0, 9.0], True),
    ],
)
def test_a_preset_leaves_out_sequences_that_are_too_far_from_the_trainer(
    name: str, ratios: list[float], is_left: bool
) -> None:
    log_ratios = [[math.log(ratio) for ratio in ratios]]
    named = [each for each in presets.names() if each == name or each.startswith(f"{name}_")]
    for each in named:
        assert _with_log_ratios(log_ratios, presets.get(each)).mask_BS.all().item() == is_left, each


def test_a_preset_weighs_at_the_level_that_the_catalog_names() -> None:
    assert {name: presets.get(name).level for name in presets.names()} == dict(CORRECTION_PRESETS)


def test_masked_importance_sampling_keeps_or_drops_a_whole_sequence_and_caps_none_of_its_tokens() -> None:
    kept, dropped = [math.log(4.0), -math.log(4.0)], [0.003, 0.003]  # geometric means 1 and 1.003
    result = _with_log_ratios([kept, dropped], presets.get("seq_mask_tis"))
    assert result.mask_BS.tolist() == [[True, True], [False, False]]
    assert result.weights_BS is not None
    assert result.weights_BS.tolist() == [pytest.approx([4.0, 0.25]), [0.0, 0.0]]
    assert _with_log_ratios([[0.0018, 0.0018]], presets.get("seq_mask_tis")).mask_BS.all()
    assert not _with_log_ratios([[-0.0012, -0.0012]], presets.get("seq_mask_tis")).mask_BS.any()


def _tokens(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-ratios, advantages and sequences of tokens end to end, with numbers that don't all occur."""
    rng, size = np.random.default_rng(seed), sum(lengths)
    sequence = np.repeat(3 * np.arange(len(lengths)) + 1, lengths)
    advantages = rng.choice([-1.0, 0.0, 0.5], len(lengths) or 1)[(sequence - 1) // 3]
    return torch.from_numpy(0.3 * rng.normal(size=size)), torch.from_numpy(advantages), torch.from_numpy(sequence)


@pytest.mark.parametrize("delta", [None, 0.0, 0.05])
@pytest.mark.parametrize("rejections", REJECTIONS)
@pytest.mark.parametrize(("level", "cap"), [(None, math.inf), ("token", 1.2), ("sequence", math.inf)])
@pytest.mark.parametrize("band", [(0.0, math.inf), (0.8, 1.3)])
def test_factors_of_an_update_equal_the_reference(
    band: tuple[float, float], level: str | None, cap: float, rejections: tuple[Rejection, ...], delta: float | None
) -> None:
    given_settings = CorrectionSettings(level, cap, band, rejections=rejections, off_policy_delta=delta)
    plain = [(r.criterion, r.low, r.high) for r in rejections]
    for seed, lengths in enumerate([[], [1], [1, 7, 3], [5] * 9]):
        tokens = _tokens(seed, lengths)
        expected = reference.factors(*(c.numpy() for c in tokens), plain, level, cap, band, delta)
        factors_N = update_factors(*tokens, given_settings)
        np.testing.assert_allclose(factors_N.numpy(), expected, rtol=1e-13, atol=1e-13)


def test_the_off_policy_mask_takes_bad_sequences_that_have_become_unlikely_and_no_others() -> None:
    drift_N = torch.tensor(
        [0.3, 0.1, 0.3, 0.1, 0.1, 0.1, -0.5, -0.5]
    )  # log(engine / policy); means 0.2, 0.2, 0.1, -0.5
    advantages_N = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    sequence_N = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    factors_N = update_factors(-drift_N, advantages_N, sequence_N, CorrectionSettings(off_policy_delta=0.15))
    assert factors_N.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


def test_the_off_policy_mask_looks_at_the_advantage_of_each_token_and_spares_one_of_zero() -> None:
    settings_of_mask = CorrectionSettings(off_policy_delta=0.0)
    factors_N = update_factors(
        torch.full((3,), -0.1), torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.int64), settings_of_mask
    )
    assert factors_N.tolist() == [0.0, 1.0, 1.0]


def test_an_engine_that_agrees_with_the_policy_leaves_every_factor_at_one() -> None:
    nothing_N, sequence_N = torch.zeros(4), torch.tensor([0, 0, 1, 2])
    for name in presets.names():
        corrected = replace(presets.get(name), off_policy_delta=0.0)
        assert update_factors(nothing_N, -torch.ones(4), sequence_N, corrected).tolist() == [1.0] * 4


def test_a_sequence_whose_distance_is_nan_is_far() -> None:
    bad_N = torch.tensor([math.nan, 0.0, 0.0])
    factors_N = update_factors(bad_N, -torch.ones(3), torch.tensor([0, 0, 1]), CorrectionSettings(off_policy_delta=0.1))
    assert factors_N.tolist() == [0.0, 0.0, 1.0]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(presets.names()))
def test_factors_depend_on_no_split_into_micro_batches(seed: int, name: str) -> None:
    tokens, corrected = _tokens(seed, [3, 1, 5, 2]), replace(presets.get(name), off_policy_delta=0.02)
    together_N = update_factors(*tokens, corrected)
    for chosen in ((tokens[2] <= 4), (tokens[2] > 4)):
        alone_N = update_factors(*(column_N[chosen] for column_N in tokens), corrected)
        torch.testing.assert_close(alone_N, together_N[chosen], rtol=1e-12, atol=0)
