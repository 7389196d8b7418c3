"""docker-compose.yml and the Kubernetes manifests against the published schemas."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
BASE = KUBERNETES / "base"
MANIFESTS = sorted(path for path in BASE.glob("*.yaml") if path.name != "kustomization.yaml")


def test_compose():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run(
        [*command, REPOSITORY / "docker-compose.yml"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifest(manifest):
    import kubernetes_validate

    resource = yaml.safe_load(manifest.read_text())
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_the_kustomization_has_all_but_the_secret():
    """An apply with the template would overwrite the keys."""
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert sorted([*listed, "secret.example.yaml"]) == [path.name for path in MANIFESTS]


def test_what_refers_to_another_manifest_finds_it():
    resources = {}
    for manifest in MANIFESTS:
        resource = yaml.safe_load(manifest.read_text())
        resources[resource["kind"]] = resource
    deployment, pod = resources["Deployment"], resources["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert resources["Service"]["spec"]["selector"] == labels
    assert resources["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = resources["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    claims = [
        volume["persistentVolumeClaim"]
        for volume in pod["spec"]["volumes"]
        if len(volume) > 1 and "persistentVolumeClaim" in volume
    ]
    assert claims == [{"claimName": resources["PersistentVolumeClaim"]["metadata"]["name"]}]
    for variable in pod["spec"]["containers"][0]["env"]:
        assert (
            variable["valueFrom"]["secretKeyRef"]["name"] == resources["Secret"]["metadata"]["name"]
        )
    monitor = yaml.safe_load((KUBERNETES / "prometheus" / "pod-monitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"]["key"] in resources["Secret"]["stringData"]
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    adapter = yaml.safe_load((KUBERNETES / "prometheus" / "adapter-values.yaml").read_text())
    (metric,) = resources["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == adapter["rules"]["custom"][0]["name"]["as"]


def test_the_gpu_patch_fits():
    base = yaml.safe_load((BASE / "deployment.yaml").read_text())
    patch = yaml.safe_load((KUBERNETES / "cuda" / "gpu.yaml").read_text())
    for key in ("apiVersion", "kind", "metadata"):
        assert patch[key] == base[key]
    names = [
        document["spec"]["template"]["spec"]["containers"][0]["name"] for document in (base, patch)
    ]
    assert names[0] == names[1]
