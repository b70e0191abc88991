"""RAY_TRAIN_V2_ENABLED=0, as people set it who have older code: the subsets are trained, then a traceback: FailureConfig got an
unexpected keyword argument 'controller_failure_limit'. Kind: ray-project/ray#57857 #57570, interTwin-eu/itwinai#401."""

from common import *

done = cli(
    "run",
    "--storage-path",
    f"{DIR}/store",
    "--minimize.epochs",
    "1",
    "--trunk.epochs",
    "0",
    "--fine-tuning.epochs",
    "0.2",
    RAY_TRAIN_V2_ENABLED="0",
)
check(
    "it runs, or is refused in a line before the subsets",
    done.returncode == 0 or "RAY_TRAIN_V2" in done.stderr.strip().splitlines()[-1],
    done.stderr.strip().splitlines()[-1][:150],
)
