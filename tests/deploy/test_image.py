"""The Dockerfile, and what has to agree with it: the paths, the port, the user, what is copied."""

import argparse
from pathlib import Path

import pytest
import yaml

from deploy.image import dockerfile

REPOSITORY = Path(__file__).parents[2]
KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
DEPLOYMENT = yaml.safe_load((KUBERNETES / "base" / "deployment.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
SERVERS = [COMPOSE["services"][name] for name in ("assent", "assent-cuda")]
PORT, UID = 8000, 10001


@pytest.fixture(scope="module")
def steps():
    return dockerfile.read()


def words(steps, name):
    return [step.words() for step in steps if step.name == name]


def test_the_reader(tmp_path):
    file = tmp_path / "Dockerfile"
    file.write_text(
        '# no\nFROM a\nRUN --mount=type=x \\\n  # why\n  b "c d" && \\\n  e\nCMD ["f", "g h"]\n'
    )
    assert dockerfile.read(file) == [
        ("FROM", "a"),
        ("RUN", 'b "c d" &&    e'),
        ("CMD", '["f", "g h"]'),
    ]
    assert dockerfile.read(file)[-1].words() == ["f", "g h"]


def test_the_image(steps):
    assert words(steps, "USER") == [[f"{UID}:{UID}"]]
    assert words(steps, "EXPOSE") == [[str(PORT)]]
    (command,) = words(steps, "CMD")
    assert command[:3] == ["python", "-m", "server"]
    assert command[command.index("--port") + 1] == str(PORT)
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert f"127.0.0.1:{PORT}/health" in dockerfile.health_command(steps)[-1]


def test_what_is_copied_is_there_and_sent_to_the_engine(steps):
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    included = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {source for *sources, _ in words(steps, "COPY") for source in sources}
    assert copied == included
    assert all((REPOSITORY / source).exists() for source in copied)


def test_the_packages_are_installed_before_the_code_is_copied(steps):
    """Otherwise a change of the code would install them again."""
    order = [step.argument for step in steps if step.name in ("COPY", "RUN")]
    (packages_index,) = (
        i for i, step in enumerate(order) if step.endswith('install.sh "$DEVICE" packages')
    )
    copied_before = {source for step in order[:packages_index] for source in step.split()}
    assert "pyproject.toml" in copied_before and "deploy/install" in copied_before
    assert not copied_before & {"server", "proxy", "judge", "training", "deploy/demo"}


def test_all_commands_serve_alike(steps):
    """The image, Compose and Kubernetes start the server with the same flags; those with volumes add `--proxy-root`."""
    parser = argparse.ArgumentParser()
    for flag in ("--host", "--port", "--model", "--served-model-name"):
        parser.add_argument(flag)
    parser.add_argument("--proxy", action="append")
    image, _ = parser.parse_known_args(words(steps, "CMD")[0][3:])
    assert image.proxy
    container = POD["containers"][0]
    commands = [
        container["command"] + container["args"],
        *(service["command"] for service in SERVERS),
    ]
    for command in commands:
        assert command[:3] == ["python", "-m", "server"]
        options, other_flags = parser.parse_known_args(command[3:])
        assert options == image
        assert "--proxy-root=/data/proxies" in other_flags


def test_ports():
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    for service in SERVERS:
        assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    assert POD["containers"][0]["ports"] == [{"name": "http", "containerPort": PORT}]
    prometheus = yaml.safe_load((REPOSITORY / "deploy/prometheus/prometheus.yml").read_text())
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"assent:{PORT}"
    assert all(service["networks"]["default"]["aliases"] == ["assent"] for service in SERVERS)


def test_nobody_is_root_and_what_is_written_can_be(steps):
    mkdir_step = next(step.argument for step in steps if "mkdir" in step.argument)
    writable = {"/home/assent", "/tmp", "/data/proxies", "/data/feedback", "/dev/shm"}
    assert f"--uid {UID} --gid {UID}" in mkdir_step
    security = POD["securityContext"]
    assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == UID
    container = POD["containers"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts <= writable and {"/home/assent", "/tmp"} <= mounts
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in POD["volumes"]
    }
    for service in SERVERS:
        assert service["read_only"]
        mounts = {volume.split("}")[-1].split(":")[1] for volume in service["volumes"]}
        assert mounts == {"/data/proxies", "/data/feedback", "/home/assent"}
        assert service["tmpfs"] == ["/tmp:exec"]
    assert all(path in mkdir_step for path in ("/data/proxies", "/data/feedback", "/home/assent"))


def test_a_rollout_leaves_time_for_what_is_under_way():
    container = POD["containers"][0]
    (drain,) = (flag for flag in container["args"] if flag.startswith("--drain-seconds="))
    _, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert POD["terminationGracePeriodSeconds"] >= int(seconds) + int(drain.split("=")[1]) + 30
    assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_secrets_have_no_defaults():
    """Compose reports a secret that is not set, and .env.example lists all of them."""
    text = (REPOSITORY / "docker-compose.yml").read_text()
    example = (REPOSITORY / ".env.example").read_text().splitlines()
    for name in ("ASSENT_API_KEYS", "ASSENT_ADMIN_KEYS", "METRICS_KEY", "GRAFANA_PASSWORD"):
        assert f"${{{name}:?" in text
        assert f"{name}=" in example
    assert "COMPOSE_PROFILES=cpu" in example
    secret = yaml.safe_load((KUBERNETES / "base" / "secret.example.yaml").read_text())
    assert set(secret["stringData"].values()) == {""}
    referenced = {
        variable["valueFrom"]["secretKeyRef"]["key"] for variable in POD["containers"][0]["env"]
    }
    assert referenced < set(secret["stringData"])
