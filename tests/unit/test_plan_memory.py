from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Coordinates, Layout, split_layers
from megarl.plan.activations import chunk_bytes, pass_of
from megarl.plan.devices import Device, device
from megarl.plan.memory import (
    CPU_KV_CACHE_BYTES,
    PROCESS_HOST_BYTES,
    SLEEPING_ENGINE_BYTES,
    Engine,
    Item,
    Phase,
    engine_of,
    phases_of,
)
from megarl.plan.run_plan import examined_ranks
from megarl.plan.static import static_bytes, static_of
from megarl.roles import Residency, Role
from megarl.weights.model_facts.shipped import shipped_config
from megarl.weights.model_shape import ModelShape, parse_model_shape
from tests.unit.composed_configs import ppo_config
from tests.unit.model_shapes import layouts_of, model_shapes
from tests.unit.small_roles import KEPT, accumulating, role_on

GIB = 2**30
H100, CPU = device("H100"), device("cpu", 4)
ENGINE = Engine(2 * GIB, 5 * GIB, 10 * GIB, 1000, frees_memory=True)
FULL = RecomputeConfig("full", "uniform", 1)
SELECTIVE = RecomputeConfig("selective", None, None)

PHASES = ["generate", "actor scoring", "actor update", "publish"]


def _shape(name: str) -> ModelShape:
    facts = shipped_config(name)
    assert facts is not None
    return parse_model_shape(facts, name)


DENSE, EXPERTS = _shape("Qwen/Qwen2.5-7B-Instruct"), _shape("Qwen/Qwen3-30B-A3B")


def _actor(
    layout: Layout,
    shape: ModelShape = DENSE,
    *,
    param_offload: bool = False,
    grad_offload: bool = False,
    optimizer_offload: bool = False,
    optimizer_on_host: bool = False,
    recompute: RecomputeConfig = KEPT,
) -> Role:
    stay = Residency(param_offload, grad_offload, optimizer_offload, optimizer_on_host)
    return role_on(layout, shape, scored=4096, updated=8192, residency=stay, recompute=recompute)


def _ref(layout: Layout, *, param_offload: bool = False) -> Role:
    return role_on(layout, DENSE, "ref", scored=4096, training=None, residency=Residency(param_offload))


def _critic(layout: Layout) -> Role:
    return replace(_of_shape(_actor(layout), DENSE.with_value_head()), name="critic")


def _of_shape(role: Role, shape: ModelShape) -> Role:
    return replace(role, model=replace(role.model, known_shape=shape))


def _phases_on(
    roles: Sequence[Role], ranks: Iterable[int], engine: Engine = ENGINE, on: Device = H100, num_micro_batches: int = 8
) -> tuple[Phase, ...]:
    batches = {role.name: accumulating(num_micro_batches) for role in roles if role.is_trained}
    return phases_of(roles, batches, engine, on, ranks)


def _phases(*roles: Role, engine: Engine = ENGINE, num_micro_batches: int = 8) -> dict[str, Phase]:
    """Return the phases of a step."""
    ranks = range(roles[0].layout.world_size)
    start, *phases = _phases_on(roles, ranks, engine, num_micro_batches=num_micro_batches)
    assert start.name == "load"
    assert len({phase.name for phase in phases}) == len(phases)
    return {phase.name: phase for phase in phases}


def _bytes(phase: Phase, name: str) -> tuple[int, int]:
    """Return what a phase has of something on the device and on the host."""
    found = [(item.device_bytes, item.host_bytes) for item in phase.items if item.name == name]
    assert len(found) <= 1
    return found[0] if found else (0, 0)


def _where(name: str, *roles: Role) -> dict[str, tuple[int, int]]:
    return {phase: _bytes(held, name) for phase, held in _phases(*roles).items()}


def test_at_the_start_models_are_built_one_after_the_other_and_the_engine_after_them() -> None:
    layout = Layout(4, tp=2)
    actor, ref = _actor(layout, param_offload=True, grad_offload=True), _ref(layout)
    [start, *_] = _phases_on([actor, ref], range(4))
    whole = static_of(actor, 0)
    assert _bytes(start, "actor parameters") == (whole.parameters, whole.parameters)
    assert _bytes(start, "actor gradients") == (whole.gradients, 0)
    assert _bytes(start, "ref parameters") == (0, 0)  # the fullest moment is before it
    assert not any("engine" in item.name for item in start.items)
    [start, *_] = _phases_on([_actor(layout), ref], range(4))
    assert _bytes(start, "ref parameters") == (static_of(ref, 0).parameters, 0)
    assert _bytes(start, "actor optimizer state") == (whole.optimizer, 0)


def test_without_offload_a_model_is_on_the_device_in_every_phase_and_the_host_has_the_process_alone() -> None:
    role = _actor(Layout(4, tp=2))
    static = static_of(role, 0)
    for name, size in (
        ("actor parameters", static.parameters),
        ("actor gradients", static.gradients),
        ("actor optimizer state", static.optimizer),
    ):
        assert _where(name, role) == dict.fromkeys(PHASES, (size, 0))
    assert {phase.host_bytes for phase in _phases(role).values()} == {PROCESS_HOST_BYTES}


def test_parameters_that_leave_come_back_for_every_use_and_keep_their_place_on_the_host() -> None:
    role = _actor(Layout(4, tp=2), param_offload=True)
    size = static_of(role, 0).parameters
    used = (size, size)
    assert _where("actor parameters", role) == {
        "generate": (0, size),
        "actor scoring": used,
        "actor update": used,
        "publish": used,
    }


def test_gradients_that_are_freed_are_nowhere_between_updates() -> None:
    role = _actor(Layout(4, tp=2), grad_offload=True)
    gone = (0, 0)
    assert _where("actor gradients", role) == {
        "generate": gone,
        "actor scoring": gone,
        "actor update": (static_of(role, 0).gradients, 0),
        "publish": gone,
    }


def test_optimizer_state_that_leaves_comes_back_for_updates_alone() -> None:
    role = _actor(Layout(4, tp=2), optimizer_offload=True)
    size = static_of(role, 0).optimizer
    away = (0, size)
    assert _where("actor optimizer state", role) == {
        "generate": away,
        "actor scoring": away,
        "actor update": (size, size),
        "publish": away,
    }


def test_an_optimizer_on_the_host_never_comes_to_the_device() -> None:
    role = _actor(Layout(4, tp=2), optimizer_on_host=True)
    assert _where("actor optimizer state", role) == dict.fromkeys(PHASES, (0, static_of(role, 0).optimizer))


def test_each_offload_moves_what_it_names_and_nothing_else() -> None:
    layout = Layout(4, tp=2)
    names = {"param_offload": "parameters", "grad_offload": "gradients", "optimizer_offload": "optimizer state"}
    for moved in names:
        for kept in names.values():
            if kept != names[moved]:
                name = f"actor {kept}"
                assert _where(name, _actor(layout, **{moved: True})) == _where(name, _actor(layout))  # type: ignore[arg-type]


def test_the_engine_is_awake_where_it_generates_and_has_its_weights_alone_where_it_is_published_to() -> None:
    phases = _phases(_actor(Layout(4)), _ref(Layout(4)), _critic(Layout(4)))
    for name, phase in phases.items():
        cache = ENGINE.memory_bytes - ENGINE.weights_bytes
        assert _bytes(phase, "engine weights") == ((ENGINE.weights_bytes if name in ("generate", "publish") else 0), 0)
        assert _bytes(phase, "engine KV cache and work") == ((cache if name == "generate" else 0), 0)
        assert _bytes(phase, "sleeping engine") == ((0 if name == "generate" else SLEEPING_ENGINE_BYTES), 0)


def test_an_engine_that_keeps_its_memory_never_sleeps() -> None:
    for phase in _phases(_actor(Layout(4)), engine=replace(ENGINE, frees_memory=False)).values():
        engine = _bytes(phase, "engine weights")[0] + _bytes(phase, "engine KV cache and work")[0]
        assert engine == ENGINE.memory_bytes
        assert _bytes(phase, "sleeping engine") == (0, 0)


def test_an_engine_whose_weights_exceed_its_memory_counts_them_whole() -> None:
    generate = _phases(_actor(Layout(4)), engine=Engine(9 * GIB, -5 * GIB, 7 * GIB, 1000, True))["generate"]
    assert _bytes(generate, "engine weights") == (9 * GIB, 0)
    assert all(item.device_bytes >= 0 and item.host_bytes >= 0 for item in generate.items)


def test_reference_and_critic_have_phases_and_memory_only_where_the_run_has_them() -> None:
    layout = Layout(4)
    alone = _phases(_actor(layout))
    assert list(alone) == PHASES
    with_all = _phases(_actor(layout), _ref(layout), _critic(layout))
    assert list(with_all) == [
        "generate",
        "actor scoring",
        "ref scoring",
        "critic scoring",
        "critic update",
        "actor update",
        "publish",
    ]
    extra = static_of(_ref(layout), 0).total + static_of(_critic(layout), 0).total
    for name in PHASES:
        assert with_all[name].device_bytes == alone[name].device_bytes + extra


def test_a_reference_that_leaves_is_on_the_device_while_it_scores_and_a_critic_never_holds_logits() -> None:
    layout = Layout(4)
    roles = _actor(layout), _ref(layout, param_offload=True), _critic(layout)
    size = static_of(roles[1], 0).parameters
    for name, at in _where("ref parameters", *roles).items():
        assert at == ((size, size) if name == "ref scoring" else (0, size))
    phases = _phases(*roles)
    assert [name for name, phase in phases.items() if _bytes(phase, "logits")[0]] == ["actor scoring", "ref scoring"]


def test_a_reward_model_scores_right_after_generation_and_is_away_else() -> None:
    layout = Layout(4)
    judge = replace(_of_shape(_ref(layout, param_offload=True), DENSE.with_value_head()), name="reward_model")
    phases = _phases(_actor(layout), judge)
    assert list(phases)[:3] == ["generate", "reward_model scoring", "actor scoring"]
    size = static_of(judge, 0).parameters
    for name, at in _where("reward_model parameters", _actor(layout), judge).items():
        assert at == ((size, size) if name == "reward_model scoring" else (0, size))
    assert _bytes(phases["reward_model scoring"], "logits") == (0, 0)


def _update_of_stage(role: Role, stage: int, num_micro_batches: int = 8) -> tuple[Item, ...]:
    """Return what a rank of a stage has in an update."""
    rank = role.layout.rank(Coordinates(tp=0, dp=0, pp=stage))
    phases = _phases_on([role], [rank], num_micro_batches=num_micro_batches)
    [items] = [phase.items for phase in phases if phase.name == "actor update"]
    return items


def _activations(role: Role, stage: int, num_micro_batches: int = 8) -> tuple[str, int]:
    """Return what the plan of an update calls a stage's activations, and their bytes."""
    [item] = [
        item for item in _update_of_stage(role, stage, num_micro_batches) if item.name.startswith("activations of ")
    ]
    return item.name.removeprefix("activations of "), item.device_bytes


@pytest.mark.parametrize("recompute", [KEPT, SELECTIVE, FULL], ids=["kept", "selective", "full"])
def test_a_stage_keeps_a_micro_batch_for_every_stage_from_it_to_the_last(recompute: RecomputeConfig) -> None:
    role = _actor(Layout(4, pp=4), recompute=recompute)
    for stage, text in enumerate(["4 micro-batches", "3 micro-batches", "2 micro-batches", "1 micro-batch"]):
        kept = chunk_bytes(pass_of(role, 8192, fused=True), stage, 0, recompute)
        assert _activations(role, stage) == (text, (4 - stage) * kept)
    assert _activations(role, 0, num_micro_batches=1)[0] == "1 micro-batch"


def test_chunks_that_take_turns_count_each_for_itself() -> None:
    """The layers differ: the dense one is in the first chunk, with the embedding, and the head is in the last."""
    shape = replace(EXPERTS, num_layers=8, dense_layers=(0,))
    role = _actor(Layout(2, pp=2, vpp=2), shape)
    p = pass_of(role, 8192, fused=True)
    kept = [[chunk_bytes(p, stage, chunk) for chunk in range(2)] for stage in range(2)]
    assert len({size for stage in kept for size in stage}) == 3  # the second and third have two layers of experts each
    assert _activations(role, 0, 2) == ("4 chunk passes", 2 * kept[0][0] + 2 * kept[0][1])
    assert _activations(role, 1, 2) == ("3 chunk passes", 2 * kept[1][0] + kept[1][1])
    assert _activations(role, 1, 1) == ("2 chunk passes", sum(kept[1]))


def test_a_stage_without_dense_layers_does_no_work_of_theirs() -> None:
    mixed = replace(EXPERTS, num_layers=4, dense_layers=(0, 1), ffn_size=2**20)

    def work(shape: ModelShape, stage: int) -> int:
        items = _update_of_stage(_actor(Layout(2, pp=2), shape), stage)
        return sum(item.device_bytes for item in items if item.name == "backward pass at work")

    assert work(mixed, 0) > work(replace(mixed, ffn_size=8), 0)
    assert work(mixed, 1) == work(replace(mixed, ffn_size=8), 1) == work(replace(mixed, dense_layers=()), 1)


RANKS = [
    Layout(8, tp=2, pp=2),
    Layout(8, pp=4),
    Layout(8, tp=8),
    Layout(16, tp=2, pp=4, sequence_parallel=True),
    Layout(64, tp=4, pp=4, ep=4, etp=1, sequence_parallel=True),
    Layout(72, pp=3),
    Layout(128, pp=4, cp=2),
]


@pytest.mark.parametrize("layout", RANKS, ids=str)
@pytest.mark.parametrize("offload", [False, True])
def test_the_ranks_that_are_examined_hold_the_most_of_all_ranks(layout: Layout, offload: bool) -> None:
    shape = EXPERTS if layout.ep > 1 else DENSE
    actor = _actor(layout, shape, optimizer_offload=offload, param_offload=offload)
    critic = _critic(Layout(layout.world_size, tp=2))
    roles = (actor, critic, replace(actor, name="ref", training=None, update=None))
    engine = replace(ENGINE, weights_bytes=GIB)
    examined = _phases_on(roles, examined_ranks(roles, layout.world_size), engine)
    for rank in range(layout.world_size):
        for phase, most in zip(_phases_on(roles, [rank], engine), examined, strict=True):
            assert phase.name == most.name
            assert phase.device_bytes <= most.device_bytes
            assert phase.host_bytes <= most.most_host_bytes
    every = _phases_on(roles, range(layout.world_size), engine)
    assert [p.device_bytes for p in every] == [p.device_bytes for p in examined]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_an_engine_on_cpu_holds_packed_copies_of_all_it_multiplies_with(tied: bool, tp: int) -> None:
    shape = replace(DENSE, tied=tied, vocab_size=1024 * tp)
    models = {"actor_rollout_ref.model.dtype": "float32", "actor_rollout_ref.rollout.tensor_model_parallel_size": tp}
    engine = engine_of(ppo_config(**models), shape, CPU)
    norms = 4 * shape.hidden_size * (2 * shape.num_layers + 1)
    biases = 4 * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // tp * shape.num_layers
    embedding = 4 * 1024 * shape.hidden_size
    matrices = engine.weights_bytes - norms - biases - embedding
    copies = engine.memory_bytes - engine.weights_bytes - CPU_KV_CACHE_BYTES
    # The output layer of a tied model is its embedding. Norms and biases, which have no copies, are a thousandth.
    assert matrices + tied * embedding <= copies <= 1.001 * (matrices + tied * embedding)


def _static(shape: ModelShape, layout: Layout, rank: int = 0) -> int:
    return static_bytes(shape, layout, rank, dtype_bytes=2, trained=False).parameters


@pytest.mark.parametrize("shape", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_more_tensor_parallel_ranks_never_hold_more_parameters_nor_does_more_of_any_axis(
    shape: ModelShape, pp: int
) -> None:
    by_tp = [_static(shape, Layout(32, tp=tp, pp=pp)) for tp in (1, 2, 4)]
    assert by_tp == sorted(by_tp, reverse=True) and by_tp[0] > 1.9 * by_tp[1]
    if shape.num_experts:
        by_ep = [_static(shape, Layout(32, pp=pp, ep=ep)) for ep in (1, 2, 4, 8)]
        assert by_ep == sorted(by_ep, reverse=True)
    sizes = [_static(shape, Layout(32, pp=pp), rank) for rank in range(0, 32, 32 // pp)]
    if pp > 1:
        assert max(sizes) < _static(shape, Layout(32, pp=pp // 2))


def _update(role: Role, num_micro_batches: int = 8) -> int:
    return _phases(role, num_micro_batches=num_micro_batches)["actor update"].device_bytes


@pytest.mark.parametrize("shape", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("layout", [Layout(8), Layout(8, pp=2), Layout(8, tp=4, sequence_parallel=True)], ids=str)
def test_recomputing_never_needs_more_memory_and_the_whole_layer_less_than_a_part(
    shape: ModelShape, layout: Layout
) -> None:
    kept, selective, full = (_update(_actor(layout, shape, recompute=r)) for r in (KEPT, SELECTIVE, FULL))
    assert full < selective <= kept
    layers = min(map(len, split_layers(shape.num_layers, layout.pp)))
    blocks = [_update(_actor(layout, shape, recompute=RecomputeConfig("full", "block", n))) for n in range(1, layers)]
    assert blocks == sorted(blocks, reverse=True) and blocks[0] <= kept


def test_a_fused_head_holds_hidden_states_where_there_were_logits_and_its_gradients_beside_its_blocks() -> None:
    layout = Layout(4, tp=4)
    plain = _actor(layout)
    fused = replace(plain, fused_head=True)
    logits, hidden = 2 * DENSE.padded_vocab(4) // 4, 2 * DENSE.hidden_size
    before, after = (_bytes(_phases(role)["actor scoring"], "logits")[0] for role in (plain, fused))
    assert before - after == 4096 * (logits - hidden)
    name = "activations of 1 micro-batch"
    before, after = (_bytes(_phases(role, num_micro_batches=1)["actor update"], name)[0] for role in (plain, fused))
    assert before - after == 8192 * logits
    assert _update(fused, 1) < _update(plain, 1)
    small, large = (_of_shape(fused, replace(DENSE, vocab_size=v)) for v in (150_000, 300_000))
    weight = 2 * DENSE.hidden_size * (pass_of(large, 1, True).vocab - pass_of(small, 1, True).vocab)
    work = [
        _bytes(_phases(role, num_micro_batches=1)["actor update"], "backward pass at work")[0]
        for role in (small, large)
    ]
    assert work[1] - work[0] == weight  # its gradient


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([H100, CPU]))
def test_no_phase_of_any_model_and_layout_has_less_than_nothing_of_anything(data: st.DataObject, place: Device) -> None:
    shape = data.draw(model_shapes())
    layout = data.draw(layouts_of(shape))
    flags = {name: data.draw(st.booleans()) for name in ("param_offload", "grad_offload", "optimizer_offload")}
    role = _actor(layout, shape, **flags)  # type: ignore[arg-type]
    for phase in _phases_on([role], range(layout.world_size), on=place):
        assert all(item.device_bytes >= 0 and item.host_bytes >= 0 for item in phase.items)
        assert phase.device_bytes == sum(item.device_bytes for item in phase.items) > 0
