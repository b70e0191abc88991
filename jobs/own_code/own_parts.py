"""Several parts in one tensor: ids beside a number in, two heads out, two targets beside a weight, and F1 of all rows.

Command:    cd jobs/own_code && raysubset run --task own_parts:Visits --data.name own_parts:visits --model.name own_parts:network --minimize.optimizer adamw --minimize.learning-rate 0.05 --minimize.epochs 20
Result:     test f1 67.5 %, 24.8 passes (n = 1, two CPU cores)
"""  # noqa: E501

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from raysubset.tasks import Spec, Task

USERS, ITEMS = 40, 60


class Visits(Task):
    quality, is_share, margin = "f1", True, 0.02

    def spec(self):
        return Spec(inputs=(3,), outputs=(2,), num_values=(USERS, ITEMS, None))  # two ids and a number

    def batch(self, rows, draws):
        inputs = torch.stack([rows["user"].float(), rows["item"].float(), rows["price"]], 1)
        return inputs, torch.stack([rows["bought"].float(), rows["stars"], rows["weight"]], 1)

    def loss(self, outputs, targets):
        bought, stars, weight = targets.unbind(1)
        each = F.binary_cross_entropy_with_logits(outputs[:, 0], bought, reduction="none")
        return (weight * (each + bought * (outputs[:, 1] - stars).square())).sum()  # there are stars for what is bought

    def measure(self, outputs, targets):
        said, bought = outputs[:, 0] > 0, targets[:, 0] > 0
        return {"hits": said & bought, "said": said, "bought": bought}

    def values(self, sums, num):
        return {"f1": 2 * sums["num_hits"] / max(1, sums["num_said"] + sums["num_bought"])}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items, self.heads = nn.Embedding(USERS, 4), nn.Embedding(ITEMS, 4), nn.Linear(5, 2)

    def forward(self, inputs):
        user, item = inputs[:, 0].long(), inputs[:, 1].long()
        return self.heads(torch.cat([self.users(user) * self.items(item), inputs[:, 2:]], 1))


def network(spec):
    return Network()


def visits(num=4000):
    draws = np.random.default_rng(0)
    users, items = draws.standard_normal((USERS, 3)), draws.standard_normal((ITEMS, 3))
    user, item, price = draws.integers(0, USERS, num), draws.integers(0, ITEMS, num), draws.random(num)
    taste = (users[user] * items[item]).sum(1) - price
    numbers = {"price": price, "stars": np.tanh(taste), "weight": draws.choice([1, 3], num)}
    return {"user": user, "item": item, "bought": taste > 0} | {k: v.astype(np.float32) for k, v in numbers.items()}
