"""Reads the pickle in a torch checkpoint without unpickling it.

A pickle is a program for a stack machine that may call anything it can import. Even an Unpickler
that may import nothing can be made to reserve gigabytes (by a large memo index) or to overflow the
C stack (by a deeply nested key). So this module interprets the few instructions that `torch.save`
writes for dictionaries of tensors, and calls only the functions in `_GLOBALS`. Any other
instruction or function is an error that names it.
"""

import pickletools
from typing import Any, NamedTuple

_MAX_AXES = 8
_MAX_INT = 1 << 62
_SHOWN = 80  # characters of a name from the file, in a message


class PickleError(ValueError):
    """The pickle is not a dictionary of tensors; the message continues after a file's name."""


class Storage(NamedTuple):
    """The array that one or more tensors are views of.

    Attributes:
      key: name of its entry in the zip archive, below `data/`.
      dtype: NumPy's name.
      length: in elements.
    """

    key: str
    dtype: str
    length: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(pickle: bytes) -> dict[str, Tensor]:
    """Returns the tensors of a pickled dictionary by name.

    All numbers are checked to be plausible, but not whether they fit the storage.

    Raises:
      PickleError: the pickle is damaged, or contains anything else.
    """
    try:
        result = _run(pickle)
    except PickleError:
        raise
    except (ValueError, TypeError, IndexError, KeyError):
        raise PickleError("has a damaged data.pkl, which names its tensors") from None
    if type(result) is not dict:
        raise PickleError("does not hold a dictionary of tensors")
    for name, value in result.items():
        if type(value) is not Tensor:
            raise PickleError(f"holds {name[:_SHOWN]!r}, which is not a tensor")
    return result


def _run(pickle: bytes) -> Any:
    """Returns the top of the stack when the program stops."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stack below each mark
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack[-1]
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[_whole(argument)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[_whole(argument)])
            case "MARK":
                below.append(stack)
                stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _put(stack[-1], key, value)
            case "SETITEMS":
                items, stack = stack, below.pop()
                for key, value in zip(items[0::2], items[1::2], strict=True):
                    _put(stack[-1], key, value)
            case "GLOBAL":
                stack.append(_global(str(argument)))
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(function(*arguments))
            case "BUILD":
                # Attributes of a state_dict: the versions of its modules. Ignored.
                stack.pop()
                if type(stack[-1]) is not dict:
                    raise TypeError
            case other:
                raise PickleError(
                    f"has a data.pkl with the instruction {other}, which torch.save does not write "
                    "for a dictionary of tensors"
                )
    raise ValueError


def _put(target: Any, key: Any, value: Any) -> None:
    # Only strings, because Python hashes nested tuples with unlimited recursion.
    if type(target) is not dict or type(key) is not str:
        raise PickleError("holds something other than a dictionary of named tensors")
    if key in target:
        raise PickleError(f"holds {key[:_SHOWN]!r} twice")
    target[key] = value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_INT:
        raise PickleError("has a data.pkl with an impossible size or offset")
    return value


class _StorageType(NamedTuple):
    dtype: str


def _storage(kind: str, storage_type: _StorageType, key: str, location: str, length: int) -> Any:
    if kind != "storage" or type(storage_type) is not _StorageType or type(key) is not str:
        raise TypeError
    return Storage(key, storage_type.dtype, _whole(length))


def _dictionary() -> dict[str, Any]:
    return {}


def _tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    metadata: Any = None,
) -> Tensor:
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise TypeError
    if len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise PickleError("has a data.pkl with an impossible shape")
    if metadata:  # it may mark the stored values as negated
        raise PickleError("holds a tensor with metadata, which may change its values")
    return Tensor(storage, _whole(offset), tuple(map(_whole, shape)), tuple(map(_whole, strides)))


def _parameter(data: Tensor, requires_grad: bool, hooks: Any) -> Tensor:
    if type(data) is not Tensor:
        raise TypeError
    return data


# A file can call each of these with arbitrary values, so each checks all of its arguments.
_GLOBALS: dict[str, Any] = {
    "collections OrderedDict": _dictionary,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch BFloat16Storage": _StorageType("bfloat16"),
    "torch HalfStorage": _StorageType("float16"),
    "torch FloatStorage": _StorageType("float32"),
}


def _global(name: str) -> Any:
    if name not in _GLOBALS:
        raise PickleError(
            f"refers to {name[:_SHOWN].replace(' ', '.')!r}, which no checkpoint in bfloat16, "
            "float16 or float32 needs, and which may run code"
        )
    return _GLOBALS[name]
