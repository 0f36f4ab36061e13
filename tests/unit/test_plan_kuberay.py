"""A plan as a RayJob of KubeRay."""

from __future__ import annotations

import json
import math

import yaml

from tests.forked import ROOT, Ended, run_forked

RECIPE = ("--config-name=ppo_megatron_trainer", "experiment=qwen3_235b_4x8")


def printed(*arguments: str) -> Ended:
    return run_forked("plan", ("-m", "megarl.plan", *RECIPE, *arguments), ROOT)


def test_the_manifest_has_a_pod_for_each_node_with_the_devices_and_memory_of_the_plan() -> None:
    done = printed("--kuberay=registry/megarl:1", "data.train_files=['a b.parquet']")
    assert (done.code, done.stderr) == (0, "")
    job = yaml.safe_load(done.stdout)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["entrypoint"] == (
        "python -m megarl.main_ppo --config-name=ppo_megatron_trainer experiment=qwen3_235b_4x8 "
        "'data.train_files=['\"'\"'a b.parquet'\"'\"']'"
    )
    cluster = job["spec"]["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 3
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], workers)]
    assert pods[0] == pods[1] and "&id" not in done.stdout
    [container] = pods[0]["containers"]
    limits = container["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 8 and limits["memory"] == f"{701 + 64 + 16}Gi"
    assert (container["image"], container["workingDir"]) == ("registry/megarl:1", "/mnt/megarl")
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/mnt/megarl"}


def test_a_run_that_does_not_fit_has_a_plan_and_no_manifest() -> None:
    done = printed("--kuberay=image", "actor_rollout_ref.rollout.gpu_memory_utilization=0.9")
    assert done.code == 1 and "does not fit" in done.stdout and "RayJob" not in done.stdout


def test_engines_in_processes_of_their_own_have_pods_of_their_own() -> None:
    rollout = "actor_rollout_ref.rollout"
    sizes = (f"{rollout}.nnodes=2", f"{rollout}.n_gpus_per_node=4", f"{rollout}.tensor_model_parallel_size=4")
    done = printed("--kuberay=image", "--gpu-memory=10000", f"{rollout}.placement=server", *sizes)
    assert (done.code, done.stderr) == (0, "")
    nodes, engines = yaml.safe_load(done.stdout)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (nodes["groupName"], nodes["replicas"]) == ("nodes", 3)
    assert (engines["groupName"], engines["replicas"], engines["rayStartParams"]["num-cpus"]) == ("engines", 2, "4")
    [container] = engines["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4


def test_a_pod_of_ranks_has_no_memory_for_engines_also_where_there_is_one_of_each() -> None:
    nodes = ("trainer.nnodes=1", "trainer.n_gpus_per_node=32", "--gpu-memory=10000")
    served = ("actor_rollout_ref.rollout.placement=server", "actor_rollout_ref.rollout.n_gpus_per_node=32")
    beside = json.loads(printed("--json", *nodes, *served).stdout)
    alone = yaml.safe_load(printed("--kuberay=image", *nodes, *served).stdout)["spec"]["rayClusterSpec"]
    [container] = alone["headGroupSpec"]["template"]["spec"]["containers"]
    of_ranks = max(phase["host_bytes"] for phase in beside["memory"]) * 32
    of_engines = beside["memory"][-1]["host_bytes"] * 32
    assert beside["host_bytes_per_node"] == of_ranks + of_engines
    assert container["resources"]["limits"]["memory"] == f"{math.ceil(of_ranks / 2**30) + 64 + 16}Gi"


def test_engines_on_the_trainers_devices_are_refused() -> None:
    served = ("actor_rollout_ref.rollout.placement=server", "actor_rollout_ref.rollout.n_gpus_per_node=0")
    done = printed("--kuberay=image", *served, "trainer.nnodes=1", "trainer.n_gpus_per_node=32", "--gpu-memory=10000")
    assert done.code != 0 and "must be at least 1 in a manifest" in done.stdout + done.stderr
