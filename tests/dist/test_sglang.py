"""A real SGLang in an environment of its own: it answers as Hugging Face does, with whatever weights it was given last.

Where it is installed (make sglang) the variable SGLANG_PYTHON names its interpreter.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.launchers.engine_processes import EngineLost, EngineProcesses
from megarl.parallel.layout import EngineLayout, Layout
from megarl.ranks.spec import EngineStart
from megarl.rollout.served import Ask, Done, Ready, Rest, Rested, Take, Took, samplings
from megarl.rollout.sglang import SglangSpec
from megarl.types import GenerationRequest, Group, Rollout, Sampling
from megarl.verify.reference import load
from megarl.verify.roles import role_on
from megarl.weights.shared import SharedWriter
from megarl.weights.shared_plan import writer_plan
from tests.dist.hf_training import greedy_answers
from tests.dist.tiny_models import save_tiny_model
from tests.launch import shared_memory
from tests.sglang_environment import SGLANG, needs_sglang

pytestmark = [pytest.mark.long, needs_sglang]

LAYOUT = Layout(1, fsdp=1)  # whose shards are the parameters of a model of transformers
PROMPTS = ((2, 5, 6, 14, 7, 8, 18), tuple(range(20, 60)), (9,))
NUM_TOKENS, MAX_TOKENS, START_S, ANSWER_S = 12, 1024, 600.0, 120.0
SHARED_MEMORY = "/dev/shm/"


@dataclass
class Served:
    """A running engine, and the trainer's memory that it reads."""

    engine: EngineProcesses
    own: psutil.Process
    writer: SharedWriter
    version: int = -1

    def processes(self) -> list[psutil.Process]:
        """Return what runs of it: its own process, and those that SGLang has started."""
        return [self.own, *self.own.children(recursive=True)]

    def publish(self, folder: Path) -> None:
        """Have the engine go on with the weights of a folder."""
        self.version += 1
        parameters: dict[str, torch.Tensor] = {}
        for name, parameter in load(folder).named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # of all experts of a layer
                parameters |= {f"{name}.{e}": expert for e, expert in enumerate(parameter.data)}
            else:
                parameters[name] = parameter.data
        self.engine.send(Take(self.version, (self.writer.write(parameters, self.version),)))

    def took(self) -> None:
        """Wait until it has."""
        assert self.hear(Took, ANSWER_S) == Took(self.version)

    def hear(self, kind: type, timeout_s: float) -> object:
        """Return the next answer of a kind."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if isinstance(answer := self.engine.receive(1.0), kind):
                return answer
        raise AssertionError(f"no {kind.__name__} came")

    def ask(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> None:
        """Ask for a group of each request."""
        indices = tuple(range(len(samplings(sampling))))
        self.engine.send(tuple(Ask(number, r, sampling, indices) for number, r in enumerate(requests)))

    def groups(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Group]:
        """Return the groups that were asked for."""
        found: dict[tuple[int, int], Rollout] = {}
        keys = [[(number, i) for i in range(len(samplings(sampling)))] for number in range(len(requests))]
        while len(found) < sum(map(len, keys)):
            done = self.hear(Done, ANSWER_S)
            assert isinstance(done, Done) and (done.number, done.index) not in found
            found[done.number, done.index] = done.rollout
        return [tuple(found[key] for key in group) for group in keys]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return the folder of a tiny model, by its name and which of two draws of its weights it has."""
    root = tmp_path_factory.mktemp("models")

    def folder(model: str, draw: str) -> Path:
        path = root / f"{model}.{draw}"
        if not path.exists():
            save_tiny_model(model, path, max_position_embeddings=MAX_TOKENS)
            file = path / "model.safetensors"
            if draw == "b":  # all rows in another order
                save_file({name: t.flip(0).contiguous() for name, t in load_file(file).items()}, file, {"format": "pt"})
        return path

    return folder


CASES = [("qwen3-untied", 1), ("qwen3-untied", 2), ("qwen2-tied", 1), ("qwen3_moe-untied", 2)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-tp{case[1]}")
def served(request: pytest.FixtureRequest, folders: Callable[[str, str], Path]) -> Iterator[tuple[Served, str]]:
    """Yield an engine of a model, and the model's name. It leaves neither processes nor shared memory."""
    model, tp = request.param
    before = shared_memory()
    server = start(folders(model, "a"), tp)
    yield server, model
    end(server, server.processes())
    assert shared_memory() - before == set()


def end(server: Served, processes: Sequence[psutil.Process]) -> None:
    """End an engine, and see that its processes end with it."""
    server.engine.kill()
    _, left = psutil.wait_procs(processes, timeout=10)
    assert left == []


def start(folder: Path, tp: int) -> Served:
    """Return an engine that is ready, on random weights."""
    server = starting(folder, tp)
    server.hear(Ready, START_S)
    return server


def starting(folder: Path, tp: int) -> Served:
    """Return an engine that has just been started."""
    actor = role_on(LAYOUT, folder)
    spec = SglangSpec(
        str(SGLANG), str(folder), "float32", tp, MAX_TOKENS, 32, None, 0.5, True, seed=0, free_cache_engine=True
    )
    plan = writer_plan(actor.shape, LAYOUT, EngineLayout(tp), 0, torch.float32.itemsize, whole=True)
    before = {child.pid for child in psutil.Process().children()}
    engine = EngineProcesses(EngineStart(spec, actor), None)
    [own] = [child for child in psutil.Process().children() if child.pid not in before]
    return Served(engine, own, SharedWriter(plan, torch.float32))


def logprobs_of(folder: Path, prompt: Sequence[int], rollout: Rollout, temperature: float) -> torch.Tensor:
    """Return what Hugging Face gives the tokens of a rollout."""
    tokens_S = torch.tensor([*prompt, *rollout.token_ids])
    with torch.no_grad():
        logits_SV = load(folder)(tokens_S[None]).logits[0, len(prompt) - 1 : -1] / temperature
    return logits_SV.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]


def test_greedy_tokens_and_log_probs_equal_hugging_faces_after_each_publication(
    served: tuple[Served, str], folders: Callable[[str, str], Path]
) -> None:
    server, model = served
    requests = [GenerationRequest(prompt, 0) for prompt in PROMPTS]
    sampling = Sampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for draw in ("a", "b"):
        folder = folders(model, draw)
        server.publish(folder)
        server.took()
        server.ask(requests, sampling)
        rollouts = [group[0] for group in server.groups(requests, sampling)]
        assert [list(r.token_ids) for r in rollouts] == greedy_answers(folder, PROMPTS, NUM_TOKENS)
        for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
            expected = logprobs_of(folder, prompt, rollout, 1.0)
            assert torch.tensor(rollout.logprobs) == pytest.approx(expected, abs=2e-5)
            assert (rollout.policy_version, rollout.finish_reason) == (server.version, "length")


def test_a_sample_depends_on_its_seed_alone_and_its_log_prob_is_that_of_the_temperature(
    served: tuple[Served, str], folders: Callable[[str, str], Path]
) -> None:
    server, model = served
    folder = folders(model, "a")
    server.publish(folder)
    server.took()
    sampling = Sampling(n=4, temperature=0.7, max_tokens=NUM_TOKENS, ignore_eos=True, with_greedy=True)
    together = [GenerationRequest(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    server.ask(together, sampling)
    groups = server.groups(together, sampling)
    server.ask(together[1:2], sampling)
    [alone] = server.groups(together[1:2], sampling)
    assert [r.token_ids for r in alone] == [r.token_ids for r in groups[1]]
    assert len({r.token_ids for r in groups[1]}) > 2, "samples of a group differ"
    *sampled, greedy = groups[1]
    assert list(greedy.token_ids) == greedy_answers(folder, PROMPTS[1:2], NUM_TOKENS)[0]
    for rollout in sampled:
        expected = logprobs_of(folder, PROMPTS[1], rollout, 0.7)
        assert torch.tensor(rollout.logprobs) == pytest.approx(expected, abs=5e-5)


def test_what_is_unfinished_goes_on_with_new_weights_at_a_token(
    served: tuple[Served, str], folders: Callable[[str, str], Path]
) -> None:
    server, model = served
    old, new = folders(model, "a"), folders(model, "b")
    server.publish(old)
    server.took()
    sampling = Sampling(temperature=0.0, max_tokens=900, ignore_eos=True)
    requests = [GenerationRequest(PROMPTS[0], 0)]
    server.ask(requests, sampling)
    time.sleep(1.5)  # for the first tokens
    server.publish(new)
    server.took()
    [[rollout]] = server.groups(requests, sampling)
    by_old, by_new = (logprobs_of(folder, PROMPTS[0], rollout, 1.0) for folder in (old, new))
    found, [(boundary, version)] = torch.tensor(rollout.logprobs), rollout.switches
    assert (rollout.policy_version, version) == (server.version - 1, server.version)
    assert 0 < boundary < sampling.max_tokens
    assert found[:boundary] == pytest.approx(by_old[:boundary], abs=5e-5)
    assert found[boundary:] == pytest.approx(by_new[boundary:], abs=5e-5), "no token is of a mixture"


def test_nothing_of_an_engine_listens_beyond_loopback(served: tuple[Served, str]) -> None:
    connections = [c for process in served[0].processes() for c in process.net_connections("inet")]
    listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening and all(ipaddress.ip_address(ip).is_loopback for ip in listening), listening


def test_an_engine_that_is_killed_while_it_starts_leaves_nothing(folders: Callable[[str, str], Path]) -> None:
    """Killed as soon as its rank has said anything of its load, which SGLang by itself keeps in shared memory."""
    server = starting(folders("qwen3-untied", "a"), 1)
    temporary, deadline_s = Path(server.own.environ()["TMPDIR"]), time.monotonic() + START_S
    while not list(temporary.glob("sglang_loads_*")) and time.monotonic() < deadline_s:
        assert in_shared_memory(server) == []
        time.sleep(0.02)
    assert list(temporary.glob("sglang_loads_*")) and in_shared_memory(server) == []
    end(server, server.processes())
    assert not temporary.exists()


def in_shared_memory(server: Served) -> list[str]:
    """Return the files of shared memory that an engine's processes have mapped, those without a name left out."""
    found: list[str] = []
    for process in server.processes():
        with suppress(psutil.NoSuchProcess):
            found += [m.path for m in process.memory_maps() if m.path.startswith(SHARED_MEMORY)]
    return [path for path in found if not path.endswith(" (deleted)")]


def test_an_engine_whose_rank_is_killed_is_lost_at_once(folders: Callable[[str, str], Path]) -> None:
    before = shared_memory()
    server = start(folders("qwen3-untied", "a"), 2)
    processes = server.processes()
    ranks = [process for process in processes if "scheduler" in " ".join(process.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    with pytest.raises(EngineLost):
        server.hear(Took, ANSWER_S)
    end(server, processes)
    assert shared_memory() - before == set()


def test_an_engine_that_has_rested_answers_with_the_weights_it_took_last_and_takes_others(
    served: tuple[Served, str], folders: Callable[[str, str], Path]
) -> None:
    server, model = served
    requests = [GenerationRequest(prompt, 0) for prompt in PROMPTS]
    sampling = Sampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)

    def answers() -> list[list[int]]:
        server.ask(requests, sampling)
        return [list(rollout.token_ids) for [rollout] in server.groups(requests, sampling)]

    def rest() -> None:
        server.engine.send(Rest())
        assert server.hear(Rested, ANSWER_S) == Rested()

    expected = {draw: greedy_answers(folders(model, draw), PROMPTS, NUM_TOKENS) for draw in ("a", "b")}
    server.publish(folders(model, "a"))
    server.took()
    assert answers() == expected["a"]
    rest()
    assert answers() == expected["a"]
    rest()
    server.publish(folders(model, "b"))
    server.took()
    rest()
    assert answers() == expected["b"]
