"""How commands speak: one line for an error, JSON or plain lines for answers, and the contract's exit codes."""

import json
import sys
from typing import Any, Final

EXIT_OK: Final = 0  # all rows have results
EXIT_FAILED: Final = 1  # the job failed, or the command cannot be right
EXIT_ROW_ERRORS: Final = 3  # finished, some rows with error records
EXIT_INTERRUPTED: Final = 130  # Ctrl-C


def exit_code(status: str, failed: int) -> int:
    """The exit code for a job that ended."""
    if status != "completed":
        return EXIT_FAILED
    return EXIT_ROW_ERRORS if failed else EXIT_OK


def print_error(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"Error: {' '.join(message.split())}\n")


def print_line(text: str = "") -> None:
    sys.stdout.write(text + "\n")


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
