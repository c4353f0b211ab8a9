"""``python -m gradl1_fast`` is the ``gradl1`` command."""

from __future__ import annotations

import sys

from gradl1_fast._extras import install

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command; say in one sentence what to install where its packages are missing."""
    try:
        from gradl1_fast.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _NEEDED:
            raise
        sys.exit(f"The gradl1 command needs {' and '.join(_NEEDED)}: {install('cli')}")
    app(prog_name="gradl1")


if __name__ == "__main__":
    main()
