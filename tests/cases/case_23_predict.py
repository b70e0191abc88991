"""raysubset predict: all files in one forward pass (ResNet-18 of 128x128: 2.4 MiB a file, 800 files 2.7 GiB); NaN as a
probability, which is no JSON, exit 0; one file that cannot be read leaves the others without an answer.
Kind: ultralytics/ultralytics#24254, ayooshkathuria/pytorch-yolo-v3#12, microsoft/Biodiversity#658."""

from common import *
import json, torch
from raysubset.config import ModelConfig
from raysubset.models import build_model
from raysubset.run_directory import RunDirectory
from raysubset.tasks import Classification, ImageInputs, Spec
from raysubset.trained_model import ModelRecord, save_model


def save(name, model, shape, scale=1.0):
    config = ModelConfig(name=model)
    network = build_model(config, Spec((shape[2], *shape[:2]), (3,)), seed=0)
    run = RunDirectory(f"{DIR}/store", name)
    save_model(
        run,
        {k: v * scale if v.is_floating_point() else v for k, v in network.state_dict().items()},
        ModelRecord(config, Classification(ImageInputs(shape, (0.5,) * shape[2], (0.2,) * shape[2]), ("a", "b", "c"))),
    )
    return run.uri


net = save("big", "resnet18", (128, 128, 3))
put("p.png", encoded(pixels(128, 128)))
code = "import resource, sys; from raysubset.trained_model.exporting import predict_files; list(predict_files(sys.argv[1], ['p.png'] * int(sys.argv[2]))); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
few, many = (
    int(subprocess.run([sys.executable, "-c", code, net, str(n)], capture_output=True, text=True).stdout)
    for n in (20, 400)
)
check(
    "memory does not grow by a network's activations a file",
    many - few < 200,
    f"{few} MiB for 20 files, {many} MiB for 400",
)
bad = save("nan", "mlp", (8, 8, 1), float("nan"))
put("g.png", encoded(pixels(8, 8, 1)))
out = cli("predict", bad, "g.png", "--format", "json")
try:
    json.loads(out.stdout, parse_constant=lambda word: 1 / 0)
    check("NaN outputs: valid JSON or an error", True)
except (ZeroDivisionError, ValueError):
    check("NaN outputs: valid JSON or an error", out.returncode != 0, out.stdout.strip())
put("bad.png", b"x")
out = cli("predict", net, "p.png", "bad.png", "p.png")
check("the files that can be read are classified", "p.png: " in out.stdout, out.stderr.strip())
