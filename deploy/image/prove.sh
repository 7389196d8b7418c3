#!/usr/bin/env bash
# Takes the Dockerfile's steps without a container engine: installs into a new directory as an
# unprivileged user, starts the image's command as that user, waits for its health check, asks one
# question and stops it. 3 GB in TMPDIR, some minutes, port 8000; nothing is left.
#
#   deploy/image/prove.sh [cpu|cuda]
set -euo pipefail
cd "$(dirname "$0")/../.."

root=$(mktemp -d "${TMPDIR:-/tmp}/assent-image-XXXXXX")
trap 'chmod -R u+w "$root" || true; rm -rf "$root"' EXIT

as_user=()
if [ "$(id -u)" = 0 ]; then
    user=$(sed -n 's/^USER \([0-9]*\):.*/\1/p' deploy/image/Dockerfile)
    chown "$user:$user" "$root"
    as_user=(setpriv "--reuid=$user" "--regid=$user" --clear-groups --no-new-privs)
fi

# As in a container: nothing of the caller's environment but the way to the packages.
mapfile -t packages < <(env | grep -E '^(PIP_|UV_|SSL_CERT_|https?_proxy=|HTTPS?_PROXY=)' || true)
"${as_user[@]}" env -i "PATH=/usr/local/bin:/usr/bin:/bin" "HOME=$root" "TMPDIR=$root" \
    "${packages[@]}" python3 -B -m deploy.image.prove "$root" "${1:-cpu}"
