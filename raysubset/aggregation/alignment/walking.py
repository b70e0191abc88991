"""Running a traced network node by node, so that tensors inside it can be seen and changed."""

from collections.abc import Generator
from typing import Any

from torch import Tensor, fx


def walk(network: fx.GraphModule, images: Tensor) -> Generator[tuple[fx.Node, Any], None, None]:
    """Yield each node in order with what it gives; values are freed after their last use, as in a forward pass.

    What the caller does to a value in place, later nodes see.
    """
    interpreter = fx.Interpreter(network)
    interpreter.args_iter = iter([images])
    for node in network.graph.nodes:
        value = interpreter.env[node] = interpreter.run_node(node)
        yield node, value
        del value
        for used in interpreter.user_to_last_uses.get(node, ()):
            del interpreter.env[used]
