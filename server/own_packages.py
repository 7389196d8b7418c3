"""Whether our packages are ours: their names are common, and Python imports the first one on its path.

Imports nothing but the standard library, so that it can run before every other import.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("server", "proxy", "judge", "training")
ROOT = Path(__file__).resolve().parents[1]
"""Directory of our packages."""


def intruders(root: Path = ROOT) -> list[str]:
    """One message for each of our packages' names that stands for something else."""
    messages = []
    for name in PACKAGES:
        spec = find_spec(name)
        expected = root / name / "__init__.py"
        if spec is None:
            messages.append(f"the package {name!r} is missing: expected {expected}")
        elif spec.origin is None or Path(spec.origin).resolve() != expected:
            places = list(spec.submodule_search_locations or ())
            where = spec.origin or ", ".join(places)
            messages.append(
                f"{where} hides Assent's package {name!r}: rename it, or start from another directory"
            )
    return messages


def check_packages() -> None:
    """End with exit code 2 and one line where another package has the name of one of ours."""
    if messages := intruders():
        print(f"python -m server: error: {messages[0]}", file=sys.stderr)
        raise SystemExit(2)
