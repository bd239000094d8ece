"""Every knob of the project (Hydra groups in this folder), and how a wrong one is reported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Wrong input. The message is one sentence: what is wrong, where, and how to mend it. code: of the command's end"""

    code = 2


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's ``main`` and exit: its own code, or 2 with one sentence on a `UserError`, or on an error of the
    system such as a full disk.

    EMU_TRACEBACK=1 shows where the error was raised.
    """
    try:
        code = main() or 0
    except UserError as error:
        if os.environ.get("EMU_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = error.code
    except OSError as error:
        if os.environ.get("EMU_TRACEBACK") or not error.strerror:  # libraries derive errors of other kinds from it
            raise
        files = " -> ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
        where = f"{files}: " if files else ""
        print(f"error: {where}{error.strerror}: mend that and run the command again", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        code = 130
    sys.exit(code)
