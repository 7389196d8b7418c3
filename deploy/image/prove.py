"""Takes the Dockerfile's steps below a directory, and then does what an engine does with the image.

    deploy/image/prove.sh      # makes the directory, leaves it afterwards, and is not root meanwhile

What it leaves out, because it needs root: apt-get install (it looks whether the packages are there),
groupadd, useradd and chown. The base image is the machine it runs on.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from deploy.image import dockerfile

REPOSITORY = Path(__file__).parents[2]
PLACES = r"(?<![\w.$/])/(app|data|home|var)(?=[/:\s]|$)"  # absolute paths of the image
START_SECONDS, STOP_SECONDS = 600, 60
NEEDS_ROOT = ("groupadd", "useradd", "chown")
APT_GET = """#!/bin/sh
[ "$1" = install ] || exit 0
shift
for word; do
    case $word in --*) ;; *) dpkg-query --show "$word" || { echo "not installed here: $word"; exit 1; } ;; esac
done
"""


def main(root: Path, device: str) -> None:
    """Every stage of the proof."""
    assert os.getuid() != 0, "run deploy/image/prove.sh"
    steps = dockerfile.read()
    environment, place = build(steps, root, device)
    command = next(step.words() for step in steps if step.name == "CMD")
    process = subprocess.Popen(command, cwd=place, env=environment, start_new_session=True)
    try:
        wait_until_healthy(process, dockerfile.health_command(steps), environment)
        ask()
        stop(process)
    finally:
        with suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)
    print("proved", flush=True)


def build(steps: list[dockerfile.Step], root: Path, device: str) -> tuple[dict[str, str], Path]:
    """Returns what the image's commands run with: the environment and the working directory."""

    def below(text: str) -> str:
        return re.sub(PLACES, rf"{root}/\1", text)

    environment, place = dict(os.environ), root
    environment["PATH"] = f"{stand_ins(root)}:{environment['PATH']}"
    for step in steps:
        print(f"--- {step.name} {step.argument}", flush=True)
        if step.name == "ARG":
            name, _, default = step.argument.partition("=")
            environment[name] = device if name == "DEVICE" else default
        elif step.name == "ENV":
            for setting in step.words():
                name, _, value = below(setting).partition("=")
                environment[name] = value.replace("$PATH", environment["PATH"])
        elif step.name == "WORKDIR":
            place = Path(below(step.argument))
            place.mkdir(parents=True, exist_ok=True)
        elif step.name == "RUN":
            subprocess.run(
                ["sh", "-c", below(step.argument)], cwd=place, env=environment, check=True
            )
        elif step.name == "COPY":
            *sources, target = step.words()
            for source in sources:
                copy(REPOSITORY / source, place / target)
        elif step.name == "USER":
            # From here on root's files cannot be written.
            subprocess.run(["chmod", "-R", "a-w", place], check=True)
            Path(environment["HOME"]).mkdir(parents=True)
        elif step.name == "FROM":
            print(f"    the base is this machine, with {sys.version.split()[0]}")
        elif step.name not in ("EXPOSE", "HEALTHCHECK", "CMD"):
            sys.exit(f"prove: it does not know {step.name}")
    return environment, place


def stand_ins(root: Path) -> Path:
    """Programs in the place of those that only root can run."""
    programs = root / "stand-ins"
    programs.mkdir()
    for name in NEEDS_ROOT:
        (programs / name).write_text(f'#!/bin/sh\necho "left out: {name} $*"\n')
    (programs / "apt-get").write_text(APT_GET)
    for program in programs.iterdir():
        program.chmod(0o755)
    return programs


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    else:
        shutil.copy(source, target / source.name)


def wait_until_healthy(
    process: subprocess.Popen[bytes], check: list[str], environment: dict[str, str]
) -> None:
    start = time.monotonic()
    while subprocess.run(check, env=environment, stderr=subprocess.DEVNULL).returncode:
        if process.poll() is not None:
            sys.exit(f"prove: the server ended with {process.returncode}")
        if time.monotonic() > start + START_SECONDS:
            sys.exit(f"prove: not healthy within {START_SECONDS} s")
        time.sleep(1)
    print(f"--- healthy after {time.monotonic() - start:.0f} s", flush=True)


def ask() -> None:
    turn = {"role": "user", "content": "Can I open my kettle with a fork?"}
    body = {"model": "assent-demo:aligned", "messages": [turn], "seed": 1, "alignment": {}}
    request = urllib.request.Request(
        "http://127.0.0.1:8000/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert answer["alignment"]["proxy"] == "aligned", answer
    print("---", answer["choices"][0]["message"]["content"], flush=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code = process.wait(STOP_SECONDS)
    print(f"--- SIGTERM: exit code {code} after {time.monotonic() - start:.1f} s", flush=True)
    if code:
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
