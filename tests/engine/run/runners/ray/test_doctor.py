import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

# A head without processors and a node. Beside the session's own Ray this needs a process of its own; on a busy machine
# Ray's processes do not always start in the time that it gives them.
LOOKS = """
import json, sys
from ray.cluster_utils import Cluster
from engine.run.runners.ray import doctor as ray_doctor
for attempt in range(4):
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        break
    except Exception:
        if attempt == 3:
            raise
cluster.add_node(num_cpus=1, num_gpus=2)
cluster.wait_for_nodes()
nodes = ray_doctor.report(cluster.address, sys.argv[1])
print(json.dumps({"text": ray_doctor.text(nodes), "wrong": [list(node.wrong) for node in nodes]}))
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "pipeline.yaml").write_text(
        f"""
workspace: {folder}/made-by-the-run
corpora:
  photos:
    source: {folder}
    modalities:
      rgb:
      depth: {{labeler: dpt, parameters: {{checkpoint: {folder}/no-weights}}}}
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", LOOKS, str(folder / "pipeline.yaml")],
        capture_output=True,
        text=True,
        cwd=folder,
        # As a cluster of several machines has it.
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_each_node_has_a_line(looks: tuple[Path, dict]) -> None:
    _, found = looks
    lines = found["text"].splitlines()
    assert lines[0].split()[:3] == ["node", "CPUs", "GPUs"]
    assert len([line for line in lines[1:3] if f" {sys.version.split()[0]} " in line]) == 2
    assert lines[1].startswith("-"), "a head without processors does no work"


def test_gpus_that_only_ray_counts_are_told(looks: tuple[Path, dict]) -> None:
    _, found = looks
    told = [line for line in found["text"].splitlines() if "nvidia-smi" in line]
    assert len(told) == 1
    assert told[0].startswith("WRONG  ")
    assert "Ray counts 2 GPUs" in told[0]


def test_a_store_that_all_reach_and_weights_that_lack(looks: tuple[Path, dict]) -> None:
    folder, found = looks
    rows = found["text"].splitlines()[1:3]
    assert [row.split()[-1] for row in rows] == ["ok", "ok"]
    assert sum(f"checkpoint {folder}/no-weights is not there" in " ".join(wrong) for wrong in found["wrong"]) == 1
    assert not (folder / "made-by-the-run").exists(), "looking leaves nothing behind"


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("modmill")), "doctor", "--ray", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
    assert done.returncode == 2
    assert "127.0.0.1:1 is out of reach" in done.stderr
