#!/usr/bin/env bash
# Installs Assent and all it needs into a virtual environment of its own; `make install` calls it.
#
#   deploy/install/install.sh cpu     vLLM's CPU build  -> .venv
#   deploy/install/install.sh cuda    vLLM's CUDA build -> .venv-cuda
#   deploy/install/install.sh cpu packages    all but assent itself: the lower layer of an image
#
# PYTHON=python3.12 picks the Python. A second run starts at once: a stamp, written last, holds what
# the environment was made from. One that is outdated is brought up to date, one without a stamp made
# afresh. The two devices never share an environment: both builds of vLLM own the package `vllm`.
set -euo pipefail
cd "$(dirname "$0")/../.."

uv_version=0.13.8
steps=5
device=${1:-cpu}
case $device in
    cpu) venv=.venv ;;
    cuda) venv=.venv-cuda ;;
    *) echo "install: DEVICE is '$device'; it can be cpu or cuda" >&2; exit 2 ;;
esac
what=${2:-all}
case $what in
    all | packages) ;;
    *) echo "install: '$what' is neither all nor packages" >&2; exit 2 ;;
esac
lock=deploy/install/$device.lock
stamp=$venv/installed-from
packages=$venv/packages-from # the same, written when the packages are there
python=$venv/bin/python

begin() { step=$1 title=$2; printf '[%s/%s] %s\n' "$step" "$steps" "$title"; }

fail() {  # fail "what to do"
    printf '\ninstall failed in step %s of %s: %s\n' "$step" "$steps" "$title"
    if [ -s "${log:-}" ]; then
        printf 'The last lines of %s:\n' "$log"
        tail -n 15 "$log" | sed 's/^/    /'
    fi
    printf 'What to do: %s\nThen run the same command again.\n' "$1"
    exit 1
} >&2

logged() { echo "+ $*" >>"$log"; "$@" >>"$log" 2>&1; }

identity() {  # which Python is behind this command; fails if it does not run
    "$1" -c 'import sys; print(sys.version.split()[0], sys.base_prefix)' 2>/dev/null
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# Which Python: the one asked for, else the one the environment has, else the first that will do.
base=${PYTHON:-}
if [ -z "$base" ]; then
    for base in "$python" python3 python3.13 python3.12 python3.11; do
        if supported "$base"; then break; fi
    done
fi

made_from() {  # everything the environment depends on, its own place included (scripts hold it)
    identity "$base"
    pwd -P
    sha256sum "$lock" pyproject.toml deploy/install/{install,pip-settings}.sh
}
wanted=$(made_from || true)
up_to_date() { [ -x "$python" ] && [ "$(cat "$1" 2>/dev/null)" = "$wanted" ]; }
if up_to_date "$stamp"; then exit 0; fi

# Two `make`s at once: the second waits for the first, and then has nothing to do.
mkdir -p "$venv"
exec 9>"$venv.lock"
if command -v flock >/dev/null; then flock 9; fi
if up_to_date "$stamp"; then exit 0; fi

begin 1 "Python 3.11, 3.12 or 3.13 on x86-64 Linux"
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    fail "the lock has packages for x86-64 Linux only, and this is $(uname -sm)."
fi
if ! supported "$base"; then
    found=$(identity "${PYTHON:-python3}" || echo "no Python that runs")
    fail "name another Python, like this: make install PYTHON=python3.12 \
(${PYTHON:-python3} is $found)."
fi
echo "      $(identity "$base")"

install_packages() {
    begin 2 "virtual environment $venv"
    # Afresh where the Python or the place is another one, or where no stamp says that the last install
    # was finished: one that was cut short may have left packages with files missing.
    if [ "$(cat "$stamp" "$packages" 2>/dev/null | head -n 2)" != "$(head -n 2 <<<"$wanted")" ]; then
        if [ "$base" = "$python" ]; then base=$("$python" -c 'import sys; print(sys._base_executable)'); fi
        logged "$base" -m venv --clear "$venv" ||
            fail "if the log says that ensurepip is missing, install your system's package for venv \
(Debian, Ubuntu: python3-venv)."
    fi
    rm -f "$stamp" "$packages"

    begin 3 "uv $uv_version, which installs the rest (pip does, more slowly, where uv can't be had)"
    uv=$venv/bin/uv
    logged "$python" -m pip install "uv==$uv_version" || uv=false
    source deploy/install/pip-settings.sh

    begin 4 "$(grep -c '==' "$lock") packages of $lock (some minutes the first time)"
    # torch goes first: it tells which way packages can be had here. The CPU build is on no default
    # index. It lies where pip's configuration points, or on PyTorch's own index, which uv knows by name.
    torch=$(grep '^torch==' "$lock")
    torch_backend=(--torch-backend cpu)
    # Bytecode now, as pip does it: without, every start where Python may write none takes 17 s longer.
    uv_sync=("$uv" pip sync --python "$python" --compile-bytecode)
    if logged "$uv" pip install --python "$python" --no-deps "$torch"; then
        install=("${uv_sync[@]}")
    elif [ "$device" = cpu ] &&
        logged "$uv" pip install --python "$python" --no-deps "${torch_backend[@]}" "$torch"; then
        install=("${uv_sync[@]}" "${torch_backend[@]}")
    elif logged "${pip_install[@]}" "$torch"; then
        install=("${pip_install[@]}" -r)
    else
        fail "check that the network, or the folder that PIP_FIND_LINKS names, can be reached. \
Offline, put the wheel of $torch into a folder and set PIP_FIND_LINKS to it. \
With a package mirror, set PIP_EXTRA_INDEX_URL to its copy of PyTorch's index for $device."
    fi
    logged "${install[@]}" "$lock" || logged "${pip_install[@]}" -r "$lock" ||
        fail "if the log speaks of the network, try again; if of the disk, make room \
(3 GB for cpu, 10 GB for cuda)."
    echo "$wanted" >"$packages"
}

log=$(mktemp "${TMPDIR:-/tmp}/assent-install-XXXXXX.log")
pip_install=("$python" -m pip install --no-deps)
if ! up_to_date "$packages"; then install_packages; fi
if [ "$what" = packages ]; then rm -f "$log"; exit 0; fi

begin 5 "assent itself, and a first import"
logged "${pip_install[@]}" --no-build-isolation --editable . ||
    fail "the log says what is wrong with pyproject.toml."
logged "$python" -c "import server, proxy.cpu.kernel, judge, training, torch, vllm  # proxy.cpu.kernel compiles
assert (torch.version.cuda is not None) == ('$device' == 'cuda'), torch.__version__" ||
    fail "the last line says what could not be imported; mend it if it is ours."

echo "$wanted" >"$stamp"
rm -f "$log"
echo "Installed into $venv."
