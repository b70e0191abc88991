"""The command line as a module: python -m raysubset."""

from raysubset.cli import main

main()
