from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megarl.errors import ConfigError, ModelFolderError
from megarl.parallel.layout import Layout
from megarl.verify.__main__ import main
from megarl.verify.figures import (
    DISTRIBUTED_GRAD_NORM,
    DISTRIBUTED_LATER_LOSSES,
    GRAD_NORM,
    LATER_LOSSES,
    LOSS,
    Figure,
    Tolerances,
)
from megarl.verify.layouts import ONE_RANK, axes_of, check_names, chosen, layouts_of, name_of, quick
from megarl.verify.measure import training_figures
from megarl.verify.reference import TEMPERATURE, InFloat64, Noise, hf_logprobs_BS, load, make_reference
from megarl.verify.roles import TRAINING, training_of
from megarl.verify.subject import subjects
from megarl.verify.work import Examined
from megarl.weights.model_shape import ModelShape

DENSE, TIED, MOE = subjects(None)
AXES = {"tp", "sp", "pp", "dp"}


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(1), "one_rank"),
        (Layout(2), "dp2"),
        (Layout(8, tp=2, pp=2, sequence_parallel=True), "tp2xpp2xdp2+sp"),
        (Layout(4, pp=2, vpp=2, cp=2), "pp2xvpp2xcp2"),
        (Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True), "tp2xdp2xep2xetp1+sp"),
        (Layout(1, fsdp=1), "fsdp1"),
        (Layout(8, cp=2, fsdp=4), "fsdp4xcopies2xulysses2"),
    ],
)
def test_a_layout_is_named_by_the_axes_that_it_uses(layout: Layout, name: str) -> None:
    assert name_of(layout) == name


@pytest.mark.parametrize("shape", [DENSE.shape, MOE.shape])
def test_every_axis_product_divides_the_ranks_and_no_name_stands_for_two_layouts(shape: ModelShape) -> None:
    layouts = layouts_of(shape, 8)
    assert len(set(layouts.values())) == len(layouts)
    for layout in layouts.values():
        assert layout.tp * layout.cp * layout.pp * layout.dp == layout.world_size
        assert layout.expert_tp * layout.ep * layout.pp * layout.edp == layout.world_size


def test_dense_layouts_are_all_splits_of_up_to_four_ranks_over_the_axes() -> None:
    found = {name for name, layout in layouts_of(DENSE.shape, 4).items() if not axes_of(layout) & {"cp", "vpp", "fsdp"}}
    plain = {"one_rank", "tp2", "pp2", "dp2", "tp4", "pp4", "dp4", "tp2xpp2", "tp2xdp2", "pp2xdp2"}
    assert found == plain | {f"{name}+sp" for name in plain if "tp" in name}


def test_fsdp_has_one_copy_of_the_model_or_two_and_ulysses_wherever_it_splits_the_heads() -> None:
    found = {name for name, layout in layouts_of(DENSE.shape, 4).items() if layout.is_fsdp and layout.world_size == 4}
    sizes = ("fsdp4", "fsdp2xcopies2")
    assert found == {size + ulysses for size in sizes for ulysses in ("", "xulysses2", "xulysses4")}


def test_what_a_model_cannot_be_split_into_is_left_out() -> None:
    assert "tp8" in layouts_of(DENSE.shape, 8)
    assert "tp16" not in layouts_of(DENSE.shape, 16)  # it has eight heads
    assert not any("ep" in axes_of(layout) for layout in layouts_of(DENSE.shape, 8).values())
    assert any("ep" in axes_of(layout) for layout in layouts_of(MOE.shape, 8).values())


def test_no_layout_has_more_ranks_than_allowed() -> None:
    assert {layout.world_size for layout in layouts_of(MOE.shape, 7).values()} == {1, 2, 4}


@pytest.mark.parametrize("shape", [DENSE.shape, MOE.shape])
def test_the_quick_layouts_use_every_axis_that_any_layout_does(shape: ModelShape) -> None:
    layouts = layouts_of(shape, 4)
    names = quick(layouts)
    used = frozenset().union(*(axes_of(layouts[name]) for name in names))
    assert used == frozenset().union(*map(axes_of, layouts.values())) >= AXES
    assert len(names) <= 5


def test_one_rank_comes_first_whatever_is_asked() -> None:
    layouts = layouts_of(DENSE.shape, 4)
    assert list(chosen(layouts, "pp2,tp2")) == [ONE_RANK, "pp2", "tp2"]
    assert next(iter(chosen(layouts, "quick"))) == next(iter(chosen(layouts, "all"))) == ONE_RANK


def test_a_name_that_one_model_has_is_no_mistake_and_one_that_none_has_is() -> None:
    models = [layouts_of(subject.shape, 4) for subject in (DENSE, MOE)]
    check_names("tp2,dp2xep2", models, 4)
    with pytest.raises(ConfigError, match=r"--layouts tp2xpp3: is no layout .* up to 4 ranks\n +fix: did you mean"):
        check_names("tp2,tp2xpp3", models, 4)


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no config\.json"):
        subjects(str(tmp_path))


def test_figures_that_are_not_numbers_are_over_their_tolerance() -> None:
    assert not Figure(LOSS, math.nan, 1e-5).passes
    assert str(Figure(LOSS, 2e-5, 1e-5)) == "2.0e-05 OVER 1.0e-05"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-ranks=0"], "--max-ranks = 0: must be at least 1"),
        (["--max-rank=2"], "--max-rank"),
        (["--layouts=tp3"], "--layouts tp3: is no layout of these models on up to 8 ranks"),
        (["--logprob-tolerance=-1"], "--logprob-tolerance = -1.0: must be at least 0"),
        (["--model=nowhere"], "no such folder"),
        (["--out=no_such_folder/page.md"], "must be in a folder that is there"),
    ],
)
def test_a_mistake_in_the_command_is_told_before_torch_is_loaded(arguments: list[str], said: str) -> None:
    code = (
        "import sys; from megarl.verify.__main__ import main; from megarl.errors import MegarlError\n"
        "try: main(sys.argv[1:])\n"
        "except MegarlError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert said in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layouts=tp4"], "--layouts tp4: is no layout of these models on up to 2 ranks"),
        (["--max-ranks=4"], "--max-ranks = 4: must be at most 2, as many ranks as were started"),
        (["--scratch=nowhere"], "--scratch = 'nowhere': must be a folder that is there"),
    ],
)
def test_ranks_that_were_started_are_as_many_as_a_layout_may_have(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "first", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        main(arguments)
    assert said in str(refused.value)


def test_the_steps_of_a_larger_model_move_its_losses_as_little_as_those_of_a_tiny_one() -> None:
    large = replace(DENSE.shape, num_layers=100 * DENSE.shape.num_layers)
    tiny, scaled = training_of(DENSE.shape), training_of(large)
    assert tiny.lr == pytest.approx(TRAINING.lr, rel=0.1)
    assert scaled.lr / tiny.lr == pytest.approx(0.1, rel=0.1)
    assert scaled.eps / scaled.lr == pytest.approx(TRAINING.eps / TRAINING.lr)


def test_optimizer_steps_are_compared_in_errors_of_hugging_face() -> None:
    def found(*steps: tuple[float, float]) -> Examined:
        metrics = tuple({"loss": loss, "grad_norm": norm} for loss, norm in steps)
        return Examined(None, None, metrics, metrics)

    alone = [found((0.5, 2.0), (0.4, 2.0), (0.3, 2.0))]
    other = [found((0.5 + 3e-6, 2.0 + 6e-6), (0.4 - 1e-5, 2.0), (0.3 + 7e-5, 9.0))]
    noise = Noise(logprobs=1e-6, gradient=1e-6, bf16=1.0)
    figures = {f.check: f for f in training_figures(other, alone, Layout(1), noise, Tolerances())}
    assert figures[LOSS].value == pytest.approx(3e-6)
    assert figures[GRAD_NORM].value == figures[DISTRIBUTED_GRAD_NORM].value == pytest.approx(3e-6)
    assert figures[LATER_LOSSES].value == figures[DISTRIBUTED_LATER_LOSSES].value == pytest.approx(7e-5)
    assert {check for check, figure in figures.items() if not figure.passes} == {LATER_LOSSES, DISTRIBUTED_LATER_LOSSES}


def test_a_reference_in_float64_is_exact_and_what_float32_loses_is_measured(tmp_path: Path) -> None:
    found = make_reference(DENSE.write(tmp_path), DENSE.shape.vocab_size)
    assert found.exact_logprobs_BS.dtype == torch.float64
    assert 1e-7 < found.noise.logprobs < 1e-5
    assert 1e-7 < found.noise.gradient < 1e-5
    assert found.noise.logprobs == float((found.logprobs_BS - found.exact_logprobs_BS).abs().max())
    # Weights that float64 alone tells apart move what is exact, by about as much: no float32 is left in between.
    model = load(found.folder, torch.float64)
    with torch.no_grad(), InFloat64():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-12)
        moved_BS = hf_logprobs_BS(model, found.everything, TEMPERATURE)
    assert 0 < float((moved_BS - found.exact_logprobs_BS).abs().max()) < 1e-9
