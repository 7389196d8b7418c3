#!/usr/bin/env bash
# Rewrites both locks from pyproject.toml: what is pinned stays unless it has to move.
# `make lock ARGS=--upgrade` takes the newest of everything. Wants `make install` first (for uv).
set -euo pipefail
cd "$(dirname "$0")/../.."

python=.venv/bin/python
uv=.venv/bin/uv
[ -x "$uv" ] || { echo "make lock: no $uv; run \`make install\` first" >&2; exit 1; }

# One lock serves Python 3.11 to 3.13 on x86-64 Linux with glibc 2.31 or newer: wheels only.
compile() {  # compile cpu|cuda [more options]
    (
        device=$1
        source deploy/install/pip-settings.sh
        unset UV_INDEX UV_INDEX_STRATEGY # a lock must not depend on what else is reached from here
        UV_CUSTOM_COMPILE_COMMAND="make lock" "$uv" pip compile pyproject.toml --quiet \
            --extra "$device" --extra train --group dev --group demo --output-file "deploy/install/$device.lock" \
            --python-version 3.11 --python-platform x86_64-manylinux_2_31 --only-binary :all: \
            --no-emit-index-url --no-emit-find-links "${@:2}"
    )
    echo "deploy/install/$1.lock: $(grep -c '==' "deploy/install/$1.lock") packages"
}

# The CPU torch: wherever pip's configuration points, else PyTorch's own index, which uv knows.
without=(--excludes deploy/install/excludes-cpu.txt)
compile cpu "${without[@]}" "$@" || compile cpu "${without[@]}" --torch-backend cpu "$@"
compile cuda "$@"
