"""The files that start a cluster are well formed: by Ray's own schema, KubeRay's field names, and the tree they copy from."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.pipeline.config import PipelineConfig

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "examples" / "cluster"
INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD"}

# Of KubeRay's RayJobSpec, RayClusterSpec, HeadGroupSpec, WorkerGroupSpec, AutoscalerOptions (ray.io/v1).
JOB = {
    *("activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector"),
    *("submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode"),
    *("entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished"),
    *("shutdownAfterJobFinishes", "suspend"),
}
SPEC = {
    *("headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions"),
    *("headServiceAnnotations", "suspend", "managedBy", "gcsFaultToleranceOptions"),
}
HEAD = {"serviceType", "headService", "enableIngress", "resources", "labels", "rayStartParams", "template"}
GROUP = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds", "resources", "labels"),
    *("rayStartParams", "template", "scaleStrategy", "suspend"),
}
AUTOSCALER = {
    *("resources", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext"),
    *("idleTimeoutSeconds", "upscalingMode", "version"),
}
POD = {"containers", "volumes", "nodeSelector", "tolerations", "terminationGracePeriodSeconds"}
CONTAINER = {"name", "image", "env", "envFrom", "resources", "volumeMounts"}


def test_the_cluster_file_is_what_ray_up_takes() -> None:
    import jsonschema
    from ray import autoscaler

    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    schema = json.loads(Path(autoscaler.__path__[0], "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert config["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in start for start in starts if "ray start" in start)
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]


def test_the_commands_of_the_cluster_file_are_shell() -> None:
    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    for name in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[name]:
            assert shlex.split(command)


@pytest.fixture(scope="module")
def kuberay() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    return {document["kind"]: document for document in documents}


def test_the_job_has_the_fields_that_kuberay_knows(kuberay: dict[str, dict[str, Any]]) -> None:
    job = kuberay["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    assert set(job["spec"]) <= JOB
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) <= SPEC
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["autoscalerOptions"]) <= AUTOSCALER
    assert set(cluster["headGroupSpec"]) <= HEAD
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group) <= HEAD | GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) <= POD
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert all(set(container) <= CONTAINER for container in pod["containers"])
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_job_runs_the_pipeline_that_it_brings(kuberay: dict[str, dict[str, Any]]) -> None:
    head = kuberay["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    name = head["volumes"][0]["configMap"]["name"]
    assert kuberay["ConfigMap"]["metadata"]["name"] == name
    (file, pipeline), *more = kuberay["ConfigMap"]["data"].items()
    assert not more
    assert kuberay["RayJob"]["spec"]["entrypoint"] == (
        f"modmill run {head['containers'][0]['volumeMounts'][0]['mountPath']}/{file}"
    )
    PipelineConfig.model_validate(yaml.safe_load(pipeline))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, in order."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_dockerfile_holds_known_instructions_and_copies_what_is_there() -> None:
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0] == ("FROM", "python:3.11-slim")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for name, rest in found if name == "COPY" for source in rest.split()[:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)
    for name, rest in found:
        if name == "CMD":
            assert json.loads(rest)
        if name == "RUN":
            assert shlex.split(rest)


def test_the_image_has_all_packages_and_no_root() -> None:
    found = instructions()
    copied = {source for name, rest in found if name == "COPY" for source in rest.split()[:-1]}
    assert copied >= {"engine", "labelers", "manifests", "tokenize_jobs", "train", "modmill.py", "pyproject.toml"}
    user = [rest for name, rest in found if name == "USER"]
    assert user == ["modmill"]
    names = [name for name, _ in found]
    assert names.index("USER") > len(names) - 1 - names[::-1].index("RUN"), "nothing is installed as that user"
    extras = next(rest.partition("=")[2] for name, rest in found if name == "ARG")
    declared = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert all(re.search(rf"^{extra} = ", declared, re.MULTILINE) for extra in extras.split(","))
