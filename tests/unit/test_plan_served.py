"""The plan of a run whose engines are in processes of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megarl.config.schema import PPOConfig
from megarl.launchers.engine_placer import engine_placer
from megarl.plan.devices import Device, device
from megarl.plan.engine_place import EnginePlace, EnginePlacer, engine_place, processes_per_node
from megarl.plan.memory import SLEEPING_ENGINE_BYTES
from megarl.plan.report import plan_text
from megarl.plan.run_plan import RunPlan, plan_run
from megarl.roles import Role, num_engine_ranks, num_engines
from megarl.weights.name_map import hf_shapes
from tests.unit.composed_configs import ppo_config, roles_in
from tests.unit.model_shapes import model_shape

ROLLOUT = "actor_rollout_ref.rollout"
SERVED: dict[str, object] = {f"{ROLLOUT}.placement": "server"}
SHAPE = replace(model_shape(), num_layers=8, hidden_size=64, ffn_size=128)
H100, CPU = device("H100"), device("cpu", 8)


def plan_of(on: Device = H100, placer: EnginePlacer = EnginePlacer.COMMAND, **changes: object) -> RunPlan:
    """Return the plan of a run of SHAPE on eight ranks."""
    config = ppo_config(**changes)
    return plan_run(config, _roles(config), on, placer=placer)


def _roles(config: PPOConfig) -> tuple[Role, ...]:
    return tuple(replace(r, model=replace(r.model, known_shape=SHAPE)) for r in roles_in(config))


def phases(plan: RunPlan) -> dict[str, set[str]]:
    """Return the names of what is held in each phase."""
    return {phase.name: {item.name for item in phase.items} for phase in plan.phases}


@pytest.mark.parametrize(
    ("changes", "engines", "ranks"),
    [
        ({}, 8, 8),
        (SERVED, 1, 1),
        (SERVED | {f"{ROLLOUT}.tensor_model_parallel_size": 2}, 1, 2),
        (SERVED | {f"{ROLLOUT}.tensor_model_parallel_size": 2, f"{ROLLOUT}.n_gpus_per_node": 6}, 3, 6),
    ],
)
def test_engines_have_devices_of_their_own_beside_the_ranks(
    changes: dict[str, object], engines: int, ranks: int
) -> None:
    config = ppo_config(**changes)
    assert (num_engines(config), num_engine_ranks(config)) == (engines, ranks)
    place = engine_place(config, EnginePlacer.COMMAND)
    assert processes_per_node(config, place) == 8 + (ranks if changes else 0)


@pytest.mark.parametrize("place", [H100, CPU])
def test_no_rank_holds_an_engine_and_no_engine_a_trained_model(place: Device) -> None:
    found = phases(plan_of(place, **SERVED))
    engine = found.pop("engine")
    assert {"engine weights", "engine KV cache and work"} < engine
    assert not any("parameters" in name or "optimizer" in name for name in engine)
    assert "generate" not in found and {"actor update", "publish"} < set(found)
    assert not any("engine KV" in name or name == "engine weights" for names in found.values() for name in names)
    assert all("weights for engines" in names for phase, names in found.items() if phase != "load")


def test_engines_on_the_ranks_devices_are_counted_there_asleep_while_these_train() -> None:
    plan = plan_of(**(SERVED | {f"{ROLLOUT}.n_gpus_per_node": 0}))
    found, colocated = phases(plan), {phase.name: phase.device_bytes for phase in plan_of().phases}
    assert (plan.num_engines, plan.shares_devices, "engine" in found) == (8, True, False)
    assert {"engine weights", "engine KV cache and work", "engine process"} < found["generate"]
    assert {"sleeping engine", "engine process"} < found["load"] & found["actor update"] & found["publish"]
    assert not {"engine weights", "engine KV cache and work"} & (found["actor update"] | found["publish"])
    [process] = [item for item in plan.phases[-2].items if item.name == "engine process"]
    [load] = [phase for phase in plan.phases if phase.name == "load"]
    assert load.device_bytes == colocated["load"] + process.device_bytes + SLEEPING_ENGINE_BYTES
    for phase in plan.phases:
        if phase.name not in ("load", "publish"):  # into an engine in the ranks weights go from device to device
            assert phase.device_bytes == colocated[phase.name] + process.device_bytes
    assert "on the ranks' devices, where they rest while these train" in plan_text(plan)
    on_cpu = plan_of(CPU, **(SERVED | {f"{ROLLOUT}.n_gpus_per_node": 0}))
    assert not on_cpu.shares_devices and "engine" in phases(on_cpu)


def test_the_weights_that_engines_read_are_in_host_memory_once() -> None:
    plan = plan_of(**SERVED)
    [item] = [item for item in plan.phases[1].items if item.name == "weights for engines"]
    numel = sum(a * (b[0] if b else 1) for a, *b in hf_shapes(SHAPE).values())
    padded = -(-SHAPE.vocab_size // 64) * 64 - SHAPE.vocab_size  # rows of embedding and output layer
    numel += 2 * padded * SHAPE.hidden_size
    assert item.device_bytes == 0 and item.host_bytes == -(-2 * numel // 8)


def test_every_byte_is_written_once_however_many_engines_read_it() -> None:
    one, three = (plan_of(**(SERVED | {f"{ROLLOUT}.n_gpus_per_node": n})).traffic for n in (1, 3))
    assert one is not None and one == three
    numel = sum(a * (b[0] if b else 1) for a, *b in hf_shapes(SHAPE).values())
    assert one.received_within == 2 * numel and one.sent_within * 8 >= 2 * numel
    assert one.sent_across == one.received_across == one.num_exchanges == 0


def test_the_plan_says_where_engines_are() -> None:
    text = plan_text(plan_of(**(SERVED | {f"{ROLLOUT}.n_gpus_per_node": 3})))
    assert "engines: 3 of TP 1, in 3 processes and on as many devices beside the ranks; counted from rank 8" in text
    assert "to the host's memory, once for all engines" in text and "exchanges between all ranks" not in text
    assert "in processes" not in plan_text(plan_of())


def test_what_crosses_to_nodes_of_engines_does_so_once_for_each() -> None:
    beside, on_two = (plan_of(**(SERVED | {f"{ROLLOUT}.nnodes": nodes})) for nodes in (1, 2))
    numel = sum(a * (b[0] if b else 1) for a, *b in hf_shapes(SHAPE).values())
    for plan, crossings in ((beside, 0), (on_two, 2)):
        assert plan.traffic is not None and plan.engine_place.is_across == bool(crossings)
        assert plan.traffic.sent_across == crossings * plan.traffic.sent_within
    assert on_two.traffic is not None and on_two.traffic.received_across == 2 * numel
    assert on_two.num_engines == 2 and on_two.host_bytes_per_node <= beside.host_bytes_per_node
    text = plan_text(on_two)
    assert (
        "engines: 2 of TP 1, on 2 nodes of their own, in 2 processes and on as many devices of their own" in text
        and "GB cross to each node of engines" in text
    )
    assert "cross to each" not in plan_text(beside)


def test_a_step_takes_as_long_as_the_longer_of_generation_and_training_where_they_overlap() -> None:
    correction = {"algorithm.rollout_correction.preset": "token_tis"}
    in_turn, ahead = (
        plan_of(**(SERVED | correction | {"trainer.mode": mode})).time for mode in ("sync", "one_step_off")
    )
    assert in_turn is not None and ahead is not None
    trained = in_turn.score + in_turn.update
    assert in_turn.total == pytest.approx(in_turn.generate + trained + in_turn.move)
    assert ahead.total == pytest.approx(max(in_turn.generate, trained) + in_turn.move)


IN_RANKS, BESIDE, APART, ANYWHERE = EnginePlace
COMMAND, HOSTS, RAY = EnginePlacer
ONE_NODE: dict[str, object] = SERVED | {f"{ROLLOUT}.n_gpus_per_node": 6}


@pytest.mark.parametrize(
    ("changes", "placer", "place", "processes"),
    [
        ({}, COMMAND, IN_RANKS, 8),
        ({"trainer.nnodes": 2}, RAY, IN_RANKS, 8),
        (ONE_NODE, COMMAND, BESIDE, 14),
        (ONE_NODE, HOSTS, APART, 8),
        (ONE_NODE | {f"{ROLLOUT}.n_gpus_per_node": 9}, HOSTS, APART, 9),
        (ONE_NODE, RAY, ANYWHERE, 14),
        (ONE_NODE | {f"{ROLLOUT}.nnodes": 2}, COMMAND, APART, 8),
        (ONE_NODE | {f"{ROLLOUT}.nnodes": 2}, HOSTS, APART, 8),
        (ONE_NODE | {f"{ROLLOUT}.nnodes": 2}, RAY, ANYWHERE, 14),
        (ONE_NODE | {"trainer.nnodes": 2}, COMMAND, APART, 8),
        (ONE_NODE | {"trainer.nnodes": 2}, HOSTS, APART, 8),
        (ONE_NODE | {"trainer.nnodes": 2}, RAY, ANYWHERE, 14),
        (SERVED | {f"{ROLLOUT}.n_gpus_per_node": 0}, COMMAND, BESIDE, 16),
    ],
)
def test_a_node_has_the_memory_devices_and_traffic_of_what_is_placed_on_it(
    changes: dict[str, object], placer: EnginePlacer, place: EnginePlace, processes: int
) -> None:
    config, plan = ppo_config(**changes), plan_of(placer=placer, **changes)
    assert plan.engine_place is place and processes_per_node(config, place) == processes
    assert plan.traffic is not None
    nodes, engine_nodes = plan.num_ranks // 8, config.actor_rollout_ref.rollout.nnodes
    of_ranks = 8 * max(phase.host_bytes for phase in plan.phases)
    engine_ranks = 0 if plan.shares_devices or place is IN_RANKS else num_engine_ranks(config) // engine_nodes
    of_engines = engine_ranks * plan.phases[-1].host_bytes
    numel = sum(a * (b[0] if b else 1) for a, *b in hf_shapes(SHAPE).values())
    if place is not IN_RANKS:
        across = place in (APART, ANYWHERE)
        assert plan.traffic.sent_across == across * engine_nodes * plan.traffic.sent_within
        assert plan.traffic.received_across == across * 2 * numel
    expected = {
        IN_RANKS: of_ranks,
        BESIDE: of_ranks + of_engines,
        APART: max(of_ranks, of_engines + 2 * numel),
        ANYWHERE: of_ranks + of_engines + 2 * numel * (nodes - 1) // nodes,
    }
    assert plan.host_bytes_per_node == expected[place]
    text = plan_text(plan)
    assert ("GB cross to each node of engines" in text) == (place in (APART, ANYWHERE))
    assert (" of their own, in " in text) == (place is APART)
    assert ("GiB, where Ray places engines on a node of ranks" in text) == (place is ANYWHERE)


@pytest.mark.parametrize(
    ("environ", "placer"),
    [
        ({}, COMMAND),
        ({"RAY_ADDRESS": "local"}, COMMAND),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, RAY),
        ({"MEGARL_ENGINE_HOSTS": "10.0.0.1:29510"}, HOSTS),
        # Ranks of torchrun and srun aren't Ray's to place, nor then are their engines.
        ({"RAY_ADDRESS": "10.0.0.1:6379", "TORCHELASTIC_RUN_ID": "none", "RANK": "0"}, COMMAND),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "RAY_ADDRESS": "a:1"}, COMMAND),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "MEGARL_ENGINE_HOSTS": "a:1"}, HOSTS),
    ],
)
def test_who_places_engines_is_read_from_the_variables_of_a_run(environ: dict[str, str], placer: EnginePlacer) -> None:
    assert engine_placer(environ) is placer
