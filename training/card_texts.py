"""What model cards say of each kind of directory: what it is, how it is used, what it cannot do."""

from typing import Literal

Kind = Literal["proxy", "adapter judge", "adapter reward", "probe", "reward", "adapter", "model"]
"""A proxy; a LoRA that judges, or whose likelihood ratio does; a probe; a reward model with weights of its own; any
other LoRA; any other LLM.
"""

WHAT: dict[Kind, str] = {
    "proxy": "A proxy for {base}. It accepts or rejects every candidate token of that frozen LLM while it is sampled "
    "(Proxy-RLHF, arXiv 2403.04283); the LLM's own weights stay as they are.",
    "adapter judge": "A judge: a LoRA on {base} that is shown two responses to a prompt and names the better one "
    "(SELF-JUDGE, arXiv 2402.11253).",
    "adapter reward": "A reward: a LoRA on {base}. The log-ratio of a response's likelihoods, with and without the "
    "LoRA, is its score (the implicit reward of DPO, arXiv 2305.18290).",
    "probe": "A reward: one linear head on the hidden states of {base}, averaged over a response. No weight of the LLM "
    "was trained.",
    "reward": "A reward model, trained from {base}. It scores a response to a prompt.",
    "adapter": "A LoRA on {base}.",
    "model": "An LLM, trained from {base}.",
}

USE: dict[Kind, str] = {
    "proxy": "python -m server --model {model} --proxy {name}=DIR",
    "adapter judge": "python -m server --model {model} --judge DIR",
    "adapter reward": "python -m server --model {model} --judge DIR",
    "probe": "python -m server --model {model} --judge DIR",
    "reward": "python -m training.proxy_ppo --model {model} --reward DIR --prompts prompts.jsonl --output runs/proxy",
    "adapter": "python -m server --model {model} --enable-lora --lora-modules {name}=DIR",
    "model": "python -m server --model DIR",
}

LIMITS: dict[Kind, tuple[str, ...]] = {
    "proxy": (
        "It works with this one LLM. The server compares the fingerprint and refuses any other.",
        "It chooses among the tokens that the LLM proposes: it cannot teach the LLM what it does not know.",
        "It learned what its reward or its preferences pay for, mistakes included. It is no safety filter.",
    ),
    "adapter judge": (
        "It works with this one LLM.",
        "It is sure of pairs like those that it was trained on, and may favour a position or a length: the server asks "
        "in both orders.",
    ),
    "adapter reward": (
        "It works with this one LLM.",
        "Scores compare responses to one prompt; they have no unit and no zero of their own.",
    ),
    "probe": (
        "It works with this one LLM.",
        "Scores compare responses to one prompt; they have no unit and no zero of their own.",
    ),
    "reward": (
        "Scores compare responses to one prompt; they have no unit and no zero of their own.",
        "A policy that is trained on it finds its mistakes: check it with a reward of another kind.",
    ),
    "adapter": (
        "It works with this one LLM.",
        "It learned what its data shows, mistakes included.",
    ),
    "model": ("It learned what its data shows, mistakes included.",),
}
