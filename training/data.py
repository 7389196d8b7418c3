"""Read JSON lines in TRL's conversational formats; a bad row is named by file and line.

{"messages": [...]}                                   for supervised fine-tuning
{"prompt": [...], "chosen": [...], "rejected": [...]} preferences
{"prompt": [...]}                                     prompts
"""

import json
from pathlib import Path
from typing import Any

from training.console import TrainingError

Row = dict[str, Any]
ROLES = ("system", "user", "assistant")


def read_rows(path: Path, fields: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a JSON-lines file, each checked: a JSON object that has `fields`, each a list of chat messages.

    Raises:
        TrainingError: no such file, no rows, or a bad row, named by file and line.
    """
    if not path.is_file():
        raise TrainingError(f"{path}: no such file")
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_parse(line, fields, where=f"{path}, line {number}"))
    if not rows:
        raise TrainingError(f"{path}: the file has no rows")
    return rows


def _parse(line: str, fields: tuple[str, ...], where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TrainingError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise TrainingError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for field in fields:
        if field not in row:
            raise TrainingError(f"{where}: the field {field!r} is missing; found {sorted(row)}")
        _check_messages(row[field], where=f"{where}, field {field!r}")
        last = row[field][-1]["role"]
        if field != "prompt" and last != "assistant":
            raise TrainingError(f"{where}, field {field!r}: ends with {last!r}, not an assistant")
    return row


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise TrainingError(f"{where}: expected a list of chat messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise TrainingError(f'{where}: a message is {{"role": ..., "content": "text"}}')
        if message.get("role") not in ROLES:
            raise TrainingError(f"{where}: role {message.get('role')!r} is not one of {ROLES}")
