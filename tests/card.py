"""A stand-in for a CUDA card, for machines without one: tensors whose values are in the CPU's memory, that say they are
on cuda:0 and, as on CUDA, cannot be computed with beside the CPU's tensors.

    with card() as waits:
        x = torch.zeros(3, device="cuda")
        x + torch.ones(3)  # RuntimeError

The kernels are the CPU's, so results are its bits. Forward-mode derivatives (gauss_newton) are beyond it.
"""

# pyright: reportAttributeAccessIssue=false, reportIncompatibleVariableOverride=false, reportOptionalMemberAccess=false
# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportCallIssue=false
# It stands for what torch does beneath its types.

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import raysubset

CARD = torch.device("cuda", 0)
_PACKAGE = os.path.join(os.path.dirname(str(raysubset.__file__)), "")
_GENERATOR_ERROR = "Expected a 'cuda' device type for generator but found 'cpu'"
_MIXED = {"aten::_to_copy", "aten::index", "aten::set_"}  # take tensors of both devices, as copy_ does
_MIXED_NUMBERS = {"aten::lerp", "aten::where", "aten::fill_", "aten::masked_fill", "aten::masked_fill_"}
_INDEX_PUT = {"aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # positions may be the CPU's
_WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
_GETTERS = (Tensor.device.__get__, Tensor.data.__get__)
_waits: Counter[str] = Counter()


class OnCard(Tensor):
    """A tensor that says it is on the card. `held` has its values."""

    held: Tensor
    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> "OnCard":
        options = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        own = Tensor._make_wrapper_subclass(cls, held.size(), **options, device="cpu", requires_grad=requires_grad)
        own.held = held.detach()
        return own

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnCard":
        if id(self) not in memo:
            memo[id(self)] = copy = OnCard(self.held.clone(), self.requires_grad)
            copy._is_param = getattr(self, "_is_param", False)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # as a checkpoint that is loaded on the CPU has it

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = func._schema.name, _tensors((args, kwargs))
        ours = [each for each in tensors if isinstance(each, OnCard)]
        others = [each for each in tensors if not isinstance(each, OnCard)]
        if name in _INDEX_PUT:
            others = [each for each in (args[0], args[2]) if not isinstance(each, OnCard)]
        takes_numbers = torch.Tag.pointwise in func.tags or name in _MIXED_NUMBERS | _INDEX_PUT or "_foreach" in name
        if name == "aten::copy_":
            _wait(len(ours) == 1 and not (len(args) > 2 and args[2]))
        elif name not in _MIXED and any(each.ndim or not takes_numbers for each in others):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")
        elif name == "aten::index":
            positions = [each for each in args[1] if each is not None]
            _wait(any(each.dtype == torch.bool or not isinstance(each, OnCard) for each in positions))
        _wait(name in _WAITING)
        wrappers = {id(each.held): each for each in ours}
        with torch.no_grad():
            args, kwargs = _mapped(lambda x: x.held if isinstance(x, OnCard) else x, (args, kwargs or {}))
            results = func(*args, **kwargs)
        of_card = {id(x): wrappers[id(x)] if id(x) in wrappers else OnCard(x) for x in _tensors(results)}
        return _mapped(lambda x: of_card.get(id(x), x), results)


class _Generator(torch.Generator):
    """A generator that says which device it was made for; its draws are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        own = super().__new__(cls, "cpu")
        own.wanted = torch.device(device)
        return own

    device = property(lambda self: self.wanted)


class _Move(torch.autograd.Function):
    """Copies a tensor to the other device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.held.clone() if isinstance(tensor, OnCard) else OnCard(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return _Move.apply(slope)


class _Functions(TorchFunctionMode):
    """Torch's functions that make, move or read tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        own = args[0] if args and isinstance(args[0], Tensor) else None
        is_ours = own is not None and isinstance(_below(own), OnCard)
        uses_card = is_ours or _is_card(kwargs.get("device"))
        if uses_card and isinstance(generator := kwargs.get("generator"), _Generator) and generator.device != CARD:
            raise RuntimeError(_GENERATOR_ERROR)
        if func == Tensor.data.__set__ and isinstance(own, OnCard):
            own.held = args[1].held
        elif is_ours and func in _GETTERS:
            return CARD if func == Tensor.device.__get__ else OnCard(own.held)
        elif is_ours and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        elif is_ours and name == "tolist":
            _wait()
            return own.held.tolist()
        elif name in ("cpu", "cuda", "to") and own is not None:
            return _to(func, own, *args[1:], **kwargs | ({} if name == "to" else {"device": name}))
        elif _is_card(kwargs.get("device")):
            made = func(*args, **kwargs | {"device": "cpu"})
            _wait(name == "tensor")
            return made if isinstance(made, OnCard) else OnCard(made, made.requires_grad)
        return _within(
            is_ours or any(isinstance(_below(x), OnCard) for x in _tensors(args)),
            func,
            *args,
            **kwargs,
        )


class _Factories(TorchDispatchMode):
    """Torch's functions make tensors in C++ on what they take for the device of a tensor of the card."""

    is_of_card = False  # the function that Python has called is given tensors of the card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **kwargs or {})
        if not self.is_of_card or _tensors((args, kwargs)):
            return results
        return _mapped(lambda x: OnCard(x) if isinstance(x, Tensor) else x, results)


def _within(is_of_card: bool, func: Any, *args: Any, **kwargs: Any) -> Any:
    before, _factories.is_of_card = _factories.is_of_card, is_of_card
    try:
        return func(*args, **kwargs)
    finally:
        _factories.is_of_card = before


_factories = _Factories()


def _to(func: Any, own: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Do Tensor.to()."""
    first = args[0] if args else None
    if isinstance(first, Tensor):
        is_of_card = isinstance(_below(first), OnCard)
        args, kwargs = args[1:], kwargs | {"device": CARD if is_of_card else "cpu", "dtype": first.dtype}
        names = ("non_blocking", "copy")
    else:
        names = ("dtype", "non_blocking", "copy") if isinstance(first, torch.dtype) else ("device", "dtype")
    kwargs |= dict(zip((*names, *("non_blocking", "copy")[: 2 * (names[0] == "device")]), args, strict=False))
    device, is_free = kwargs.pop("device", None), kwargs.pop("non_blocking", False)
    if device is not None and torch.device(device).type != "meta":
        if _is_card(device) != isinstance(_below(own), OnCard):
            _wait(not is_free or not _is_card(device))
            own = _Move.apply(own) if own.requires_grad else _Move.forward(None, own)
            kwargs["copy"] = False
    elif device is not None:
        return func(own.held if isinstance(own, OnCard) else own, "meta")
    kwargs = {key: value for key, value in kwargs.items() if value not in (None, False)}
    return Tensor.to(own, **kwargs) if set(kwargs) - {"copy"} else own.clone() if kwargs else own


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _mapped(do: Callable[[Any], Any], tree: Any) -> Any:
    """Do it to every leaf. torch's own tree_map() takes four times as long, of what a function of torch takes here."""
    if isinstance(tree, dict):
        return {key: _mapped(do, value) for key, value in tree.items()}
    return type(tree)([_mapped(do, item) for item in tree]) if isinstance(tree, list | tuple) else do(tree)


def _below(tensor: Tensor) -> Tensor:
    """Return the tensor under torch.func's wrappers."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _is_card(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _wait(waits: bool = True) -> None:
    """Count that the line of the package waits for the card, if it does."""
    frame = sys._getframe(1) if waits else None
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is not None:
        _waits[f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}"] += 1


def _grouped(lists: Any, *rest: Any) -> dict[Any, Any]:
    """Do torch's function, which reads devices in C++, with the card as the device of its tensors."""
    groups = _group_tensors(lists, *rest)
    return {(CARD if isinstance(g[0][0][0], OnCard) else key[0], key[1]): g for key, g in groups.items()}


_group_tensors = torch._C._group_tensors_by_device_and_dtype


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, **options: Any) -> None:
        super().__init__("cpu", **options)


@contextmanager
def card() -> Iterator[Counter[str]]:
    """Let torch say that there is a card, without bfloat16. Yield how often each line of the package waits for it."""
    generator = _Generator("cuda")
    stream = mock.Mock(is_capturing=lambda: False)
    places: list[tuple[Any, dict[str, Any]]] = [
        (torch, {"autocast": _Autocast, "Generator": _Generator}),
        (torch._C, {"_group_tensors_by_device_and_dtype": _grouped, "_InferenceMode": lambda mode: torch.no_grad()}),
        (torch.accelerator, {"current_stream": lambda *_: stream}),
        (torch.backends.cudnn, {"is_acceptable": lambda tensor: False}),
        (
            torch.cuda,
            {
                **dict.fromkeys(("is_available",), lambda: True),
                **dict.fromkeys(("is_bf16_supported", "is_current_stream_capturing"), lambda **_: False),
                **dict.fromkeys(("synchronize", "empty_cache", "_lazy_init"), lambda *_: None),
                "current_device": lambda: 0,
                "max_memory_allocated": lambda device: 1,
                "get_device_name": lambda device: "stand-in",
                "default_generators": (generator,),
                "get_rng_state": lambda *_: generator.get_state(),
                "set_rng_state": lambda state, *_: generator.set_state(state),
            },
        ),
    ]
    with ExitStack() as stack:
        for place, values in places:
            stack.enter_context(mock.patch.multiple(place, **values))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot become one of the card
        stack.enter_context(_factories)
        stack.enter_context(_Functions())
        _waits.clear()
        yield _waits
