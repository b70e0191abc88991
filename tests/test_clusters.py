"""What clusters/ and jobs/runtime_env.yaml promise, checked without a cluster: Ray's and KubeRay's schemas, versions,
placement, and what must not be open."""

import copy
import os
import re
import runpy
import shlex
import socket
import subprocess
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import raysubset.cluster  # noqa: F401  before anything imports Ray, so that a cluster of these tests has its own token

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "clusters"
CRDS = Path(os.environ.get("RAYSUBSET_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay_crds"))

CLOUDS = ("aws", "gcp")
SCALED = (*CLOUDS, "local_autoscaling")
ALL = (*SCALED, "on_premise")
MANIFESTS = ("raycluster", "rayjob")


def cluster(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())


def manifest(name: str) -> dict[str, Any]:
    """The first document, which is Ray's."""
    return next(yaml.safe_load_all((CLUSTERS / "kuberay" / f"{name}.yaml").read_text()))


def ray_cluster_spec(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def containers(name: str) -> Iterator[dict[str, Any]]:
    spec = ray_cluster_spec(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]


# Ray's schema


def check_with_ray(config: dict[str, Any]) -> None:
    """What `ray up` checks before it starts anything, and what it does not: least and most nodes of a type."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    for name, kind in prepared["available_node_types"].items():
        least, most = kind.get("min_workers", 0), kind.get("max_workers", 0)
        if not 0 <= least <= most:
            raise ValueError(f"{name}: min_workers {least} and max_workers {most}")


@pytest.mark.parametrize("name", ALL)
def test_ray_accepts_the_cluster(name: str):
    check_with_ray(cluster(name))


# KubeRay's schema


@cache
def crd_validator(kind: str) -> jsonschema.Draft7Validator:
    """The custom resource's own schema, strict as `kubectl --validate=strict` is."""
    path = CRDS / f"ray.io_{kind}s.yaml"
    if not path.is_file():
        pytest.skip(f"no KubeRay CRD at {path}; set RAYSUBSET_KUBERAY_CRDS to the folder that holds it")
    crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural OpenAPI schema as JSON Schema that refuses what it does not name."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {key: value for key, value in schema.items() if key not in ("nullable", "format")}
    if schema.get("nullable") and "type" in schema:
        strict["type"] = [schema["type"], "null"]
    if "properties" in schema:
        strict["properties"] = {key: _strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            strict[key] = _strict(schema[key])
    return strict


def check_with_kuberay(kind: str, resource: dict[str, Any]) -> list[str]:
    """Where it is wrong, and how."""
    errors = crd_validator(kind).iter_errors(resource)
    return ["/".join(map(str, error.absolute_path)) + ": " + error.message[:200] for error in errors]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_accepts_the_manifest(name: str):
    assert check_with_kuberay(name, manifest(name)) == []


def test_planted_mistakes_in_a_manifest_are_found():
    def planted(change: Callable[[dict[str, Any]], object]) -> list[str]:
        resource = manifest("rayjob")
        change(resource["spec"]["rayClusterSpec"])
        return check_with_kuberay("rayjob", resource)

    assert "maxReplica" in planted(lambda spec: spec["workerGroupSpecs"][0].update(maxReplica=3))[0]
    assert "'8'" in planted(lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="8"))[0]
    assert "num-cpus" in planted(lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}))[0]
    assert "Fast" in planted(lambda spec: spec["autoscalerOptions"].update(upscalingMode="Fast"))[0]
    assert "headGroupSpec" in planted(lambda spec: spec.pop("headGroupSpec"))[0]


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_autoscaler_makes_of_a_manifest_what_it_says(name: str):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = {"metadata": {"name": "any", "namespace": "any"}, "spec": ray_cluster_spec(name)}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    assert (types["headgroup"]["resources"]["CPU"], types["headgroup"]["resources"]["GPU"]) == (0, 0)
    assert types["gpu-spot"]["min_workers"] == 0 < types["gpu-spot"]["max_workers"]
    assert types["gpu-spot"]["resources"]["GPU"] == 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_asks_for_a_token_and_lets_its_pods_end_in_peace(name: str):
    spec = ray_cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= 60
        assert pod["restartPolicy"] == "Never"
        assert any(toleration["key"] == "nvidia.com/gpu" for toleration in pod["tolerations"])
        assert all(c["resources"]["requests"] == c["resources"]["limits"] for c in pod["containers"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_may_write_to_a_volume_that_was_made_for_root(name: str):
    spec = ray_cluster_spec(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["fsGroup"] == 100  # of Ray's images


def test_all_pods_share_the_storage_that_the_job_writes_to():
    words = shlex.split(manifest("rayjob")["spec"]["entrypoint"])
    storage_path = words[words.index("--storage-path") + 1]
    for name in MANIFESTS:
        assert all(storage_path in [m["mountPath"] for m in c["volumeMounts"]] for c in containers(name))
    _, claim = yaml.safe_load_all((CLUSTERS / "kuberay" / "raycluster.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_job_gives_its_pods_back():
    spec = manifest("rayjob")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["activeDeadlineSeconds"] > 0


# Versions, images and entrypoints


def test_ray_has_one_version_everywhere():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (least,) = (found[1] for text in dependencies if (found := re.fullmatch(r"ray\[.*\]>=([\d.]+)", text)))
    version = f"{least}.0"
    assert f"\nFROM rayproject/ray:{version}-py3" in (CLUSTERS / "Dockerfile").read_text()
    for name in MANIFESTS:
        assert ray_cluster_spec(name)["rayVersion"] == version
    for name in (*CLOUDS, "on_premise"):
        assert f'pip install -q "ray[default,train,tune]=={version}"' in cluster(name)["setup_commands"]


def test_the_images_named_are_the_one_that_is_built():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    images = {container["image"] for name in MANIFESTS for container in containers(name)}
    (image,) = images
    header, _, _ = (CLUSTERS / "Dockerfile").read_text().partition("\nFROM ")
    assert f"-t {image} " in header
    assert f"/{package['name']}:{package['version']}-ray{ray_cluster_spec('rayjob')['rayVersion']}" in image


def test_what_the_image_copies_exists():
    copies = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", (CLUSTERS / "Dockerfile").read_text(), re.MULTILINE)
    assert copies
    assert all((ROOT / path).exists() for line in copies for path in line.split())


def test_entrypoints_are_jobs_with_flags_that_they_know():
    from tests.flags import parse_config

    python, script, *flags = shlex.split(manifest("rayjob")["spec"]["entrypoint"])
    assert python == "python"
    assert script.startswith("jobs/")
    assert (ROOT / script).is_file()
    config = parse_config(flags)
    assert config.actors.num_gpus == 1  # no node is up when it starts, so nothing shows that there are GPUs
    text = (CLUSTERS / "README.md").read_text()
    named = set(re.findall(r"\b(?:jobs|clusters)/[\w/]+\.(?:py|yaml)", text))
    assert named
    assert all((ROOT / path).is_file() for path in named)


# Placement


@pytest.mark.parametrize("name", SCALED)
def test_the_head_gets_no_work_and_workers_start_from_none(name: str):
    config = cluster(name)
    types, head = config["available_node_types"], config["head_node_type"]
    assert types[head]["resources"] == {"CPU": 0}
    assert types[head]["max_workers"] == 0
    workers = {key: kind for key, kind in types.items() if key != head}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] <= config["max_workers"] for kind in workers.values())
    assert config["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("name", [*CLOUDS, "on_premise"])
def test_the_head_is_started_without_cpus_and_with_its_dashboard_on_loopback(name: str):
    *_, start = (command for command in cluster(name)["head_start_ray_commands"] if "ray start" in command)
    for flag in ("--head", "--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1", "--disable-usage-stats"):
        assert flag in start.split()


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_nodes_come_before_those_on_demand_and_the_head_is_none(name: str):
    def is_spot(node: dict[str, Any]) -> bool:
        market = node.get("InstanceMarketOptions", {}).get("MarketType")
        return market == "spot" or node.get("scheduling", {}).get("provisioningModel") == "SPOT"

    types = cluster(name)["available_node_types"]
    assert not is_spot(types["head"]["node_config"])
    assert is_spot(types["gpu.spot"]["node_config"])
    assert not is_spot(types["gpu.on_demand"]["node_config"])
    assert types["gpu.spot"]["resources"] == types["gpu.on_demand"]["resources"]
    assert types["gpu.spot"]["priority"] > types["gpu.on_demand"]["priority"]


def test_published_node_types_are_those_the_autoscaler_may_start():
    node_groups = runpy.run_path(str(CLUSTERS / "publish_node_types.py"))["node_groups"]
    spot, on_demand = node_groups(cluster("aws"))
    assert spot == {"name": "gpu.spot", "resources": {"CPU": 4, "GPU": 1}, "min_count": 0, "max_count": 8}
    assert (on_demand["name"], on_demand["max_count"]) == ("gpu.on_demand", 2)
    (pods,) = node_groups(manifest("raycluster"))
    assert (pods["name"], pods["max_count"], pods["resources"]["GPU"]) == ("gpu-spot", 8, 1)


@pytest.mark.parametrize("name", CLOUDS)
def test_a_node_waits_for_a_lock_of_apts_and_installs_once(name: str, tmp_path: Path):
    (command,) = (command for command in cluster(name)["setup_commands"] if "apt-get" in command)
    stubs = {
        "sudo": 'echo "$@" >> log; [ $(wc -l < log) -ge 3 ]',  # the lock is free at the third time
        "sleep": "exit 0",
        "python3": 'mkdir -p ~/venv; echo "python3 $@" >> log',
    }
    for word, body in stubs.items():
        (tmp_path / word).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / word).chmod(0o755)
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, check=True)
    install = "DEBIAN_FRONTEND=noninteractive apt-get install -yq python3-venv"
    assert (tmp_path / "log").read_text().splitlines() == [
        *["apt-get update -q"] * 3,
        install,
        f"python3 -m venv {tmp_path}/venv",
    ]


# What must not be open, and what must not travel


@pytest.mark.parametrize("name", [*CLOUDS, "on_premise"])
def test_nodes_ask_for_a_token_that_only_their_user_can_read(name: str):
    config = cluster(name)
    assert any("export RAY_AUTH_MODE=token" in command for command in config["initialization_commands"])
    assert config["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"
    assert "~/.ray/auth_token" in config["file_mounts"].values()


@pytest.mark.parametrize("path", [*(f"{name}.yaml" for name in ALL), "local_autoscaling.py"])
def test_nothing_listens_for_everybody(path: str):
    text = (CLUSTERS / path).read_text()
    assert "0.0.0.0" not in text
    assert "dashboard-host" in text


def test_no_file_names_this_machine():
    import ray.util

    own = {socket.gethostname(), ray.util.get_node_ip_address(), str(Path.home()), str(ROOT)}
    for path in [*CLUSTERS.rglob("*"), ROOT / "jobs" / "runtime_env.yaml"]:
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text()
            assert not [word for word in own - {"127.0.0.1", "/"} if re.search(rf"{re.escape(word)}(?!\w)", text)], path


def test_a_job_leaves_at_home_what_must_not_travel(tmp_path: Path):
    from ray._private.runtime_env.packaging import create_package

    home = {".git/config", ".venv/bin/python", "data/mnist", "results/run/model", "raysubset.egg-info/PKG-INFO"}
    home |= {"raysubset/__pycache__/a.pyc", ".pytest_cache/b", "x.whl"}
    travels = {"raysubset/data/files.py", "jobs/subset_pretraining.py", "pyproject.toml"}
    checkout, package = tmp_path / "checkout", tmp_path / "package.zip"
    for name in home | travels:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("text")
    excludes = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())["excludes"]
    create_package(str(checkout), package, include_gitignore=False, excludes=excludes)
    with zipfile.ZipFile(package) as content:
        assert {name for name in content.namelist() if not name.endswith("/")} == travels


def test_a_job_and_a_rayjob_have_the_same_environment():
    ours = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    assert yaml.safe_load(manifest("rayjob")["spec"]["runtimeEnvYAML"])["env_vars"] == ours["env_vars"]
