"""`python -m tests.training.saves DIR`: saves into the directory again and again, until it is killed."""

import sys
from itertools import cycle
from pathlib import Path

from training.saving import saving

if __name__ == "__main__":
    for letter in cycle("AB"):
        with saving(Path(sys.argv[1])) as directory:
            for name in ("config.json", "model.safetensors", "reward.json", "tokenizer.json"):
                (directory / name).write_text(letter * 1_000_000)
