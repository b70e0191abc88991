"""python -m raysubset"""

from raysubset.cli import main

main()
