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
    ran = subprocess.run(
        [*command, REPOSITORY / "docker-compose.yml"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


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
    found = {}
    for manifest in MANIFESTS:
        resource = yaml.safe_load(manifest.read_text())
        found[resource["kind"]] = resource
    deployment, pod = found["Deployment"], found["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    scaled = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", deployment["metadata"]["name"])
    claims = [
        v["persistentVolumeClaim"]
        for v in pod["spec"]["volumes"]
        if len(v) > 1 and "persistentVolumeClaim" in v
    ]
    assert claims == [{"claimName": found["PersistentVolumeClaim"]["metadata"]["name"]}]
    for variable in pod["spec"]["containers"][0]["env"]:
        assert variable["valueFrom"]["secretKeyRef"]["name"] == found["Secret"]["metadata"]["name"]
    monitor = yaml.safe_load((KUBERNETES / "prometheus" / "pod-monitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"]["key"] in found["Secret"]["stringData"]
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    adapter = yaml.safe_load((KUBERNETES / "prometheus" / "adapter-values.yaml").read_text())
    (metric,) = found["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == adapter["rules"]["custom"][0]["name"]["as"]


def test_the_gpu_patch_fits():
    base = yaml.safe_load((BASE / "deployment.yaml").read_text())
    patch = yaml.safe_load((KUBERNETES / "cuda" / "gpu.yaml").read_text())
    for key in ("apiVersion", "kind", "metadata"):
        assert patch[key] == base[key]
    names = [each["spec"]["template"]["spec"]["containers"][0]["name"] for each in (base, patch)]
    assert names[0] == names[1]
