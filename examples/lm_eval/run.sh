#!/usr/bin/env bash
# Evaluates the frozen LLM and a proxy with lm-eval. Only tasks that generate text: log-likelihoods need a prompt's own.
#
#   make serve DEMO=toy
#   pip install 'lm-eval[api]'
#   examples/lm_eval/run.sh assent-demo assent-demo:aligned
set -euo pipefail
cd "$(dirname "$0")/../.."

for model in "$@"; do
    OPENAI_API_KEY=${ASSENT_API_KEY:-none} PYTHONPATH=. ${LM_EVAL:-lm_eval} \
        --model local-chat-completions --apply_chat_template \
        --model_args "model=$model,base_url=${ASSENT_URL:-http://127.0.0.1:8000}/v1/chat/completions,num_concurrent=8" \
        --include_path examples/lm_eval --tasks "${TASKS:-toy_flaws}" --limit "${LIMIT:-60}" --seed 1
done
