"""Stores a user's own network as a graph of torch's core operators, in JSON, so that loading a run's model does not
call the user's code. This module reads and writes no files.

graph, constants = trace(network, spec)
same = GraphNetwork(graph, network.state_dict() | constants, spec)

torch's own file of an exported program (.pt2) is not safe: loading one unpickles its contents. A graph of unknown
origin can call only the operators that `_operator` allows, on tensors and plain numbers.
"""

import contextlib
import io
import logging
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from raysubset.errors import first_line
from raysubset.tasks import Spec

_FORMAT = 1
_TOLERANCE = 1e-4  # between the graph's outputs and the network's, relative to the largest
_NUM_TRIED = (2, 32)  # numbers of examples on which a graph is tried, with meta tensors
_MOST_VALUES = 2**27  # in one tensor, for each example of a batch: half a GiB of float32

# Operators on sizes. A size is an int, or torch's symbol for one while a graph is traced again
_ON_SIZES: dict[str, Callable[..., Any]] = {
    "item": operator.getitem,
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "neg")},
}
_WORDS: dict[str, Any] = {
    str(word).removeprefix("torch."): word
    for word in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        *(torch.strided, torch.contiguous_format, torch.channels_last, torch.preserve_format),
    )
}
_OPERATOR_NAME = re.compile(r"aten\.([a-z][a-z0-9_]*|_[a-z][a-z0-9_]*)\.([A-Za-z][A-Za-z0-9_]*)")
_REFUSED = ("empty", "empty_strided", "_local_scalar_dense", "_embedding_bag", "sym_storage_offset")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # not decomposed: unrolling takes torch a minute for 64 tokens
_ALLOWED = ("adaptive_max_pool2d", "im2col", "pixel_shuffle", "pixel_unshuffle", "unfold", *_RECURRENT)  # as pure


def export(network: nn.Module, sample: Tensor) -> ExportedProgram:
    """Return torch's exported program of the network, for any number of examples.

    Raises:
        ValueError: if torch.export cannot trace the network.
    """
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.CRITICAL)  # if tracing fails, the tracer prints its graph here and on stderr
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return torch.export.export(network, (sample,), dynamic_shapes=({0: Dim("num_images", min=1)},))
    except Exception as error:  # torch.export may raise anything
        raise ValueError(f"torch.export cannot trace this network: {first_line(error)}") from error
    finally:
        log.setLevel(level)


def refuse_difference(outputs: Tensor, expected: Tensor) -> None:
    """Raise a ValueError if outputs that should be the network's differ from those by more than rounding."""
    difference = float((outputs - expected).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(f"the traced network's outputs differ from the network's by {difference:g}")


def trace(network: nn.Module, spec: Spec) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Trace a network on the CPU in evaluation mode.

    Returns:
        The graph, a tree for JSON, and the constant tensors that the network's state dict does not hold.

    Raises:
        ValueError: if torch.export cannot trace it, or it is not a function of its inputs by allowed operators alone.
    """
    network, was_training = network.eval(), network.training
    sample = spec.random(3, torch.Generator().manual_seed(0))
    try:
        table = torch.export.default_decompositions()
        for packet in (getattr(torch.ops.aten, name) for name in _RECURRENT):
            for overload in packet.overloads():
                table.pop(getattr(packet, overload), None)
        program = export(network, sample).run_decompositions(table)
        graph, constants = _record(program)
        with torch.no_grad():
            expected = network(sample)
            same = GraphNetwork(graph, {**network.state_dict(), **constants}, spec)
            refuse_difference(same(sample), expected)
    finally:
        network.train(was_training)
    return graph, constants


def _record(program: ExportedProgram) -> tuple[dict[str, Any], dict[str, Tensor]]:
    signature, traced = program.graph_signature, program.graph_module.graph
    if changed := [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]:
        raise ValueError(f"the network changes {', '.join(changed)} when it predicts")
    traced.eliminate_dead_code()
    tensors, constants, numbers = [], {}, {}
    for node, spec in zip(traced.find_nodes(op="placeholder"), signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            numbers[node] = 0
            continue
        name = spec.target
        if name is None or spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise ValueError(f"the network needs {spec.arg.name}, which is no tensor")
        if spec.kind is InputKind.CONSTANT_TENSOR or spec.persistent is False:
            constant = program.constants[name]
            assert isinstance(constant, Tensor)
            constants[name] = constant.detach().clone()
        tensors.append({"name": name, "parameter": spec.kind is InputKind.PARAMETER})
        numbers[node] = len(tensors)
    calls, names = [], {function: name for name, function in _ON_SIZES.items()}
    for node in traced.nodes:
        if node.op != "call_function" or (not node.users and "assert" in str(node.target)):
            continue
        numbers[node] = len(tensors) + len(calls) + 1
        arguments = {key: _encode(value, numbers) for key, value in node.kwargs.items()}
        if (name := names.get(node.target)) is None:
            name = str(node.target)
            _operator(name)  # refuses what a graph may not call
        calls.append([name, [_encode(value, numbers) for value in node.args], arguments])
    (outputs,) = traced.output_node().args[0]  # pyright: ignore[reportGeneralTypeIssues]
    return {"format": _FORMAT, "tensors": tensors, "calls": calls, "outputs": numbers[outputs]}, constants


def _encode(value: Any, numbers: Mapping[fx.Node, int]) -> Any:
    match value:
        case fx.Node():
            return {"value": numbers[value]}
        case list() | tuple():
            return [_encode(item, numbers) for item in value]
        case float() if not math.isfinite(value):
            return {"number": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case torch.device():
            return {"device": "of the inputs"}
    name = str(value).removeprefix("torch.")
    if name not in _WORDS:
        raise ValueError(f"the network's graph holds {value!r}")
    return {"torch": name}


def _operator(name: str) -> Callable[..., Any]:
    """Return the torch function that a graph may call by this name.

    The core ATen operators compute with tensors: none opens files, runs code or changes its arguments. Backward passes,
    whose indices torch does not check, and operators that read memory outside their tensors are not allowed.

    Raises:
        ValueError: if the graph may not call it.
    """
    if match := _OPERATOR_NAME.fullmatch(name):
        function = getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
        if (
            isinstance(function, torch._ops.OpOverload)
            and (torch.Tag.core in function.tags or match[1] in _ALLOWED)
            and not function._schema.is_mutable
            and not match[1].endswith("_backward")
            and match[1] not in _REFUSED
        ):
            return function
    raise ValueError(f"{name} is not one of torch's core operators that a graph may call")


class GraphNetwork(nn.Module):
    """A network in evaluation mode, computed call by call. Its state dict has the traced network's names."""

    def __init__(self, graph: Any, tensors: Mapping[str, Tensor], spec: Spec) -> None:
        """Build the network and check it on meta tensors, which take no memory: the graph may hold anything.

        Args:
            graph: the first result of trace().
            tensors: the weights and constants that the graph names.
            spec: the shapes of inputs and outputs.

        Raises:
            ValueError: if it is no graph from inputs to outputs of these shapes, or needs more memory than a network
                would.
        """
        super().__init__()
        try:
            if graph["format"] != _FORMAT:
                raise ValueError(f"its format is {graph['format']!r}, this version reads {_FORMAT}")
            self._graph = graph
            self._tensors = [self._hold(entry["name"], tensors, bool(entry["parameter"])) for entry in graph["tensors"]]
            self._calls = _parse(graph)
            meta_tensors = [getattr(owner, name).to("meta") for owner, name in self._tensors]
            for num in _NUM_TRIED:
                limited = _Limited(self, graph=self._calls)
                limited.most_values = num * _MOST_VALUES
                outputs = limited.run(spec.zeros(num).to("meta"), *meta_tensors)
                if tuple(outputs.shape) != (num, *spec.outputs) or not outputs.is_floating_point():
                    raise ValueError(f"it gives {outputs.dtype} {list(outputs.shape)} for {num} examples")
        except Exception as error:  # with a graph of unknown origin, any line above may raise anything
            raise ValueError(f"it holds no network with outputs {list(spec.outputs)}: {first_line(error)}") from error

    def _hold(self, name: str, tensors: Mapping[str, Tensor], is_parameter: bool) -> tuple[nn.Module, str]:
        """Register a tensor under a dotted name; return the module that owns it and its name there."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if is_parameter:
            owner.register_parameter(leaf, nn.Parameter(tensors[name].clone(), tensors[name].is_floating_point()))
        else:
            owner.register_buffer(leaf, tensors[name].clone())
        return owner, leaf

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the tree: torch's operators in its calls do not pickle."""
        return {key: value for key, value in vars(self).items() if key != "_calls"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._calls = _parse(self._graph)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and warn that the calls stay those of evaluation: torch.export left out what training adds."""
        if mode:
            text = (
                "this network is the graph of its evaluation mode: its batch norms keep their statistics, and it "
                "drops nothing out; give load_model() the network, model=…, or trust_code=True, to train it as it was"
            )
            warnings.warn(text, stacklevel=2)
        return super().train(mode)

    def forward(self, inputs: Tensor) -> Tensor:
        values = (getattr(owner, name) for owner, name in self._tensors)
        return fx.Interpreter(self, graph=self._calls).run(inputs, *values)


class _Limited(fx.Interpreter):
    """Computes a graph, and raises a ValueError if a tensor has too many values."""

    most_values: int

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.numel() > self.most_values:
                raise ValueError(f"a tensor of {tensor.numel()} values is beyond {self.most_values}")
        return value


def _parse(graph: Mapping[str, Any]) -> fx.Graph:
    """Return the graph as torch's, of inputs and tensors. No code is generated of it: an interpreter runs it."""
    calls = fx.Graph()
    values = [calls.placeholder(f"value_{number}") for number in range(len(graph["tensors"]) + 1)]
    device = calls.call_function(getattr, (values[0], "device"))

    def decoded(argument: Any) -> Any:
        match argument:
            case list():
                return [decoded(item) for item in argument]
            case {"value": number} if 0 <= number < len(values):
                return values[number]
            case {"torch": name}:
                return _WORDS[name]
            case {"number": text}:
                return float(text)
            case {"device": _}:
                return device
            case dict():
                raise ValueError(f"{argument} is no argument of a graph")
        return argument

    for name, arguments, keywords in graph["calls"]:
        function = _of_sizes(_ON_SIZES[name]) if name in _ON_SIZES else _operator(name)
        named = {key: decoded(argument) for key, argument in keywords.items()}
        values.append(calls.call_function(function, tuple(decoded(argument) for argument in arguments), named))
    calls.output(values[graph["outputs"]])
    return calls


def _of_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have one of Python's own operators refuse other arguments than sizes: a list times a number, or huge numbers."""

    @wraps(function)
    def checked(*arguments: Any) -> Any:
        if function is operator.getitem:
            are_sizes = len(arguments) == 2 and isinstance(arguments[0], list | tuple) and type(arguments[1]) is int
        else:
            are_sizes = all(isinstance(a, torch.SymInt) or (type(a) is int and abs(a) < 2**31) for a in arguments)
        if not are_sizes:
            raise ValueError(f"{function.__name__} of something other than sizes")
        return function(*arguments)

    return checked
