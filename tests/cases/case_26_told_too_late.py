"""What flags and data decide is told after all subsets are trained, and tried four times: batches of one example for two
workers ("cannot be shared by 2 workers: use fewer" after 182 s of a tiny run). Kind: pytorch/pytorch#4534. Starts Ray."""

from common import *
import json, glob

done = run("late", **{"minimize.batch_size": 1, "fine_tuning.epochs": 0.05, "fine_tuning.num_workers": 2})
check(
    "refused before any subset is trained",
    not glob.glob(f"{DIR}/store/late/rounds/0000/minima/*/minimum.json"),
    str(done)[:120],
)
tries = glob.glob(f"{DIR}/store/late/ledger/fine_tuning-*")
check("a mistake is not tried again", len(tries) <= 1, f"{len(tries)} attempts at fine-tuning")
