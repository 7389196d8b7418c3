# Sourced by install.sh and lock.sh: hands pip's configuration on to uv, which does not read it.
# Wants $python (an interpreter with pip) and $device. What is already set for uv stays.

pip_setting() {  # "find-links" -> $PIP_FIND_LINKS, or else what pip.conf says, on one line
    local variable
    variable=PIP_$(tr 'a-z-' 'A-Z_' <<<"$1")
    if [ -n "${!variable:-}" ]; then
        echo "${!variable}"
    else
        "$python" -m pip config get "global.$1" 2>/dev/null | xargs || true
    fi
}

export_unless_empty() { if [ -n "$2" ]; then export "$1=$2"; fi; }

if [ -z "${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-}}" ]; then
    export_unless_empty UV_DEFAULT_INDEX "$(pip_setting index-url)"
fi
if [ -z "${UV_INDEX:-${UV_EXTRA_INDEX_URL:-}}" ]; then
    export_unless_empty UV_INDEX "$(pip_setting extra-index-url)"
    # pip takes the best version from all indexes; uv would stop at the first that knows the name.
    if [ -n "${UV_INDEX:-}" ]; then export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}; fi
fi
# The CPU torch may lie there; and 2.13.0+cpu counts as a 2.13.0, which CUDA must not get.
if [ -z "${UV_FIND_LINKS:-}" ] && [ "$device" = cpu ]; then
    export_unless_empty UV_FIND_LINKS "$(pip_setting find-links | tr ' ' ',')"
fi
if [ -z "${SSL_CERT_FILE:-}" ]; then
    export_unless_empty SSL_CERT_FILE "$(pip_setting cert)"
fi
