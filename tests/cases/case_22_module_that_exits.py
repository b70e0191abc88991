"""A user's module that calls sys.exit(0) when imported (a script without a main guard) ends raysubset with exit code 0 and
not a word; one with parse_args() prints its own usage for raysubset's flags. Kind: ray-project/ray#21037."""

from common import *

open("ends.py", "w").write("import sys\nsys.exit(0)\ndef net(k, s): ...\n")
done = cli("run", "--model.name", "ends:net", "--storage-path", f"{DIR}/store")
check(
    "exit code 0 is for runs that were done",
    done.returncode != 0 and "ends" in done.stderr,
    f"exit {done.returncode}, stdout {done.stdout!r}, stderr {done.stderr!r}",
)
