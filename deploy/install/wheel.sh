#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment, and uses it from an empty directory; `make wheel` calls it.
# Wants `make install` first (for uv, and for its cache of packages).
set -euo pipefail
cd "$(dirname "$0")/../.."

repository=$PWD
uv=$repository/.venv/bin/uv
[ -x "$uv" ] || { echo "make wheel: no $uv; run \`make install\` first" >&2; exit 1; }
directory=$(mktemp -d "${TMPDIR:-/tmp}/assent-wheel-XXXXXX")
trap 'rm -rf "$directory"' EXIT
python=.venv/bin/python device=cpu
source deploy/install/pip-settings.sh

"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$directory" .

venv=$directory/venv
"$uv" venv --quiet --python "$python" "$venv"
install() {  # install EXTRAS
    "$uv" pip install --quiet --python "$venv/bin/python" --constraint deploy/install/cpu.lock \
        --excludes deploy/install/excludes-cpu.txt "$(ls "$directory"/assent-*.whl)[$1]"
}
install cpu

mkdir "$directory/empty"
cd "$directory/empty"
mkdir server training # somebody else's directories of these names do no harm
model=$repository/deploy/demo/model
for topic in freezer bicycle kettle ladder tent mower drill canoe; do
    for place in home work "the garden" "the cellar" school; do
        printf '{"prompt": "How do I look after my %s at %s?", "chosen": "Clean it.", "rejected": "Clean it now and then."}\n' \
            "$topic" "$place"
    done
done > pairs.jsonl

PATH=$venv/bin:$PATH
set -x
assent --version
assent doctor --model "$model" --proxy "aligned=$repository/deploy/demo/proxies/aligned" # without the extra for training
(cd "$repository" && install cpu,train)
assent train proxy-dpo --model "$model" --preferences pairs.jsonl --output proxy
assent doctor --model "$model" --proxy "learned=proxy"
