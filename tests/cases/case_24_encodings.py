"""Where stdout is ASCII the run is done, its page written, and then it ends with exit code 2, "a mistake": 'ascii' codec can't
encode … (report, doctor, --help likewise). Kind: Textualize/rich#212, AnswerDotAI/fastprogress#21, alexjc/neural-enhance#199."""

from common import *

for words in (["run", "--help"], ["doctor", "--storage-path", f"{DIR}/store"]):
    done = cli(*words, PYTHONIOENCODING="ascii")
    check(
        " ".join(words[:2]),
        done.returncode in (0, 1) and "codec" not in done.stderr,
        f"exit {done.returncode}: {done.stderr.strip()[:90]}",
    )
done = cli(
    "run",
    "--storage-path",
    f"{DIR}/store",
    "--name",
    "a",
    "--minimize.epochs",
    "1",
    "--trunk.epochs",
    "0",
    "--fine-tuning.epochs",
    "0",
    PYTHONIOENCODING="ascii",
)
check("run", done.returncode == 0, f"exit {done.returncode}: {done.stderr.strip()[-140:]}")
