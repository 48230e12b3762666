"""`python -m mergeopd` is the `mergeopd` command (torchrun needs a module to start)."""

import sys


def main() -> None:
    """Entry point; a Ctrl-C during the first imports leaves no traceback."""
    try:
        from mergeopd.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
