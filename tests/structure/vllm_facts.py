"""What megarl's engine uses of vLLM on GPUs, and what releases of it define, read from their source.

    python -m tests.structure.vllm_facts WHEEL... > tests/structure/vllm_releases.json

writes the facts that ``test_vllm_names`` needs of releases that aren't installed: for each name the parameters that it
takes, or null where there is no such name.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.structure.megatron_facts import Parameters, Release, open_release

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINE = REPOSITORY / "megarl" / "rollout" / "vllm.py"

_LLM, _WORKER = "vllm.entrypoints.llm", "vllm.v1.worker.gpu_worker"
_ENGINE, _OUTPUTS = "vllm.v1.engine.llm_engine", "vllm.v1.engine.output_processor"
_EXECUTOR, _CONFIG = "vllm.v1.executor.uniproc_executor", "vllm.config.compilation"

# Module, name -> the keywords that it is given.
USES: dict[tuple[str, str], str] = {
    (_LLM, "LLM.generate"): "prompts sampling_params use_tqdm",
    (_LLM, "LLM.apply_model"): "func",
    (_LLM, "LLM.collective_rpc"): "method",
    (_LLM, "LLM.reset_prefix_cache"): "",
    (_LLM, "LLM.sleep"): "level",
    (_LLM, "LLM.wake_up"): "tags",
    (_LLM, "LLM.llm_engine"): "",
    (_ENGINE, "LLMEngine.model_executor"): "",
    (_ENGINE, "LLMEngine.add_request"): "request_id prompt params",
    (_ENGINE, "LLMEngine.has_unfinished_requests"): "",
    (_ENGINE, "LLMEngine.step"): "",
    (_ENGINE, "LLMEngine.reset_prefix_cache"): "reset_running_requests",
    (_ENGINE, "LLMEngine.output_processor"): "",
    (_OUTPUTS, "OutputProcessor.request_states"): "",
    (_OUTPUTS, "RequestState.external_req_id"): "",
    (_OUTPUTS, "RequestState.detokenizer"): "",
    ("vllm.v1.engine.detokenizer", "IncrementalDetokenizer.num_output_tokens"): "",
    ("vllm.distributed.parallel_state", "destroy_model_parallel"): "",
    ("vllm.distributed.device_communicators.shm_broadcast", "MessageQueue.create_from_process_group"): "",
    (_EXECUTOR, "ExecutorWithExternalLauncher.shutdown"): "",
    (_EXECUTOR, "ExecutorWithExternalLauncher.sleep"): "level",
    (_EXECUTOR, "ExecutorWithExternalLauncher.wake_up"): "tags",
    (_WORKER, "Worker.sleep"): "level",
    (_WORKER, "Worker.wake_up"): "tags",
    (_WORKER, "Worker.load_model"): "load_dummy_weights",
    (_CONFIG, "CompilationConfig.pass_config"): "",
    (_CONFIG, "PassConfig.fuse_allreduce_rms"): "",
}

# What is a word in vLLM and no name: file, and the text in which it stands.
WORDS = (
    ("vllm/v1/worker/gpu_worker.py", 'tag="weights"'),
    ("vllm/v1/worker/gpu_worker.py", 'tag="kv_cache"'),
    ("vllm/v1/executor/uniproc_executor.py", 'os.environ["LOCAL_RANK"]'),
    ("vllm/v1/executor/uniproc_executor.py", 'os.environ["RANK"]'),
    ("vllm/config/model.py", '"processed_logprobs"'),
)
# Asynchronous scheduling may differ between ranks where the engine asks whether a step is already done.
UNSAID = (("vllm/v1/engine/core.py", ".done()"),)


def all_uses() -> dict[tuple[str, str], tuple[str, ...]]:
    """Return every name that is used, with its keywords: those of USES, and those that the engine's source shows."""
    tree = ast.parse(ENGINE.read_text(encoding="utf-8"))
    found = {name: tuple(words.split()) for name, words in USES.items()}
    found["vllm.engine.arg_utils", "EngineArgs"] = tuple(sorted(_keywords(tree, "LLM")))
    found |= {("vllm.sampling_params", f"SamplingParams.{word}"): () for word in _keywords(tree, "SamplingParams")}
    return found | {("vllm.envs", variable): () for variable in sorted(_variables(tree))}


def _keywords(tree: ast.Module, called: str) -> Iterator[str]:
    """Yield the keywords of the calls of a name, those too of the dictionaries that functions return into ``**``."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == called:
            for keyword in node.keywords:
                if keyword.arg is not None:
                    yield keyword.arg
                elif isinstance(keyword.value, ast.Call) and isinstance(keyword.value.func, ast.Name):
                    yield from _returned_keys(functions[keyword.value.func.id])


def _returned_keys(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
            yield from (str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))


def _variables(tree: ast.Module) -> set[str]:
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if text.startswith("VLLM_") and text.replace("_", "").isalnum()}


def facts_of(release: Release) -> dict[str, Parameters | None]:
    """Return what a release says of the names that are used."""
    return {f"{module}:{name}": release.parameters(module, name) for module, name in all_uses()}


def words_of(read: Mapping[str, str]) -> dict[str, bool]:
    """Return which of WORDS and UNSAID stand in the files of a release."""
    return {f"{file}: {word}": word in read[file] for file, word in (*WORDS, *UNSAID)}


def files_of(path: Path) -> dict[str, str]:
    """Return the text of the files that WORDS and UNSAID name, of a wheel or of the folder that holds ``vllm``."""
    names = {file for file, _ in (*WORDS, *UNSAID)}
    if path.is_dir():
        return {name: (path / name).read_text(encoding="utf-8") for name in names}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode("utf-8") for name in names}


def main(paths: list[str]) -> None:
    """Print the facts of each wheel, by its version."""
    found = {}
    for path in map(Path, paths):
        version = path.name.split("-")[1]
        found[version] = {"names": facts_of(open_release(path)), "words": words_of(files_of(path))}
    json.dump(found, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(sys.argv[1:])
