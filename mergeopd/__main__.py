"""`python -m mergeopd` is the `mergeopd` command (torchrun needs a module to start)."""

from mergeopd.cli import main

if __name__ == "__main__":
    main()
