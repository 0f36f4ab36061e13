"""The seed of each sample."""

from __future__ import annotations

from megarl.rollout.vllm import sample_seed

CPU_GENERATOR_MASK = 2**32 - 1  # torch's generator on CPU is seeded by the low 32 bits


def test_samples_of_a_group_never_share_a_seed() -> None:
    for seed in range(100):
        assert len({sample_seed(seed, index) & CPU_GENERATOR_MASK for index in range(64)}) == 64


def test_neighbouring_requests_share_no_seed() -> None:
    seeds = [sample_seed(seed, index) & CPU_GENERATOR_MASK for seed in range(128) for index in range(8)]
    assert len(set(seeds)) == len(seeds)


def test_seeds_fit_into_the_63_bits_that_vllm_takes() -> None:
    assert all(0 <= sample_seed(seed, 1000) < 2**63 for seed in (0, -1, 2**63 - 1, -(2**63)))


def test_seeds_stay_what_they_were_so_that_a_run_can_be_repeated() -> None:
    assert [sample_seed(7, index) for index in range(2)] == [3358912076837644941, 3358912076837644942]
