"""A network that ends in softmax (as many do): the loss takes a softmax of its probabilities, and predict another: at most
57.6 % of three classes, however sure it is; nothing says that logits are wanted. Kind: MicrosoftDocs/ml-basics#48, ariecattan/SciCo#2."""

from common import *
import torch
from raysubset.config import ModelConfig
from raysubset.models import build_model
from raysubset.run_directory import RunDirectory
from raysubset.trained_model import ModelRecord, save_model
from raysubset.trained_model.exporting import predict_files
from raysubset.tasks import Classification, ImageInputs, Spec

module("net", "def make(k, s): return nn.Sequential(nn.Flatten(), nn.Linear(s[0]*s[1]*s[2], k), nn.Softmax(1))\n")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    try:
        network = build_model(ModelConfig(name="net:make"), Spec((1, 8, 8), (3,)), seed=0)
    except ValueError:
        check("outputs that sum to 1 are refused", True)
        sys.exit()
run_ = RunDirectory(f"{DIR}/store", "s")
network[1].weight.data.mul_(1000)
save_model(
    run_,
    network.state_dict(),
    ModelRecord(ModelConfig(name="net:make"), Classification(ImageInputs((8, 8, 1), (0.5,), (0.2,)), ("a", "b", "c"))),
)
put("p.png", encoded(pixels(8, 8, 1)))
sure = next(predict_files(run_.uri, ["p.png"])).probabilities[0]
check(
    "outputs that sum to 1 are told of, or their probabilities are theirs",
    bool(told) or sure > 0.99,
    f"a network that is sure predicts with {sure:.1%}",
)
