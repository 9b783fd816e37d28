# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Reads tensors from files of `torch.save`, of any origin: calls nothing in them, allocates no more than they hold.

`torch.load(weights_only=True)` runs no code either, but it calls what a file asks for if it is in a list of torch's:
codecs, and constructors that allocate whatever they are told to. Here a name in a pickle stands for a rule of this
module, or for nothing.
"""

import io
import math
import os
import pickle
import pickletools
import stat
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch

from ..messages import printable


MOST_PICKLED = 64 * 2**20
"""Bytes of names, shapes and settings that are read. A training checkpoint of the largest variant has one megabyte, but
some runs keep every loss since their beginning."""
MOST_OPCODES = 2**20
"""Steps that a pickle may ask for; that training checkpoint asks for a tenth of them."""
# How a file from before torch 1.6 begins: a magic number and the version of its format, each a pickle.
LEGACY_BEGINNING = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
WHOLE_NETWORK = (
    "looks like a whole network, pickled by `torch.save(model)` with its classes ({}): its weights cannot be read"
    " without running their code, and nothing was run; save `model.state_dict()` where that code is, and convert that"
)
OTHER_ORDER = "was written by a machine with another order of bytes"
# Pickle's opcodes that `torch.save` writes.
OPCODES = set(
    """PROTO STOP GLOBAL REDUCE BUILD NEWOBJ BINPERSID MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINSTRING BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT
    SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT""".split()
)
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QInt8Storage": torch.int8,  # of quantised tensors only the storage is read; see `RULES`
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
}


class Refused(Exception):
    """A file is not read; the message is the end of a sentence that begins with its path."""


class NoTensor(NamedTuple):
    """Stands for a tensor that cannot be a weight, and says why."""

    problem: str


class Ignored:
    """Stands for an object that is not needed, as settings and metrics are; takes any arguments and keeps none."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Container(dict[Any, Any]):
    """Stands for every kind of dictionary, and begins empty."""

    def __init__(self, *arguments: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


class Rule:
    """Stands for a function that a pickle calls by name. A pickle cannot change it."""

    __slots__ = ("function",)
    function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a rule cannot be changed")


def strided(
    values: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *others: Any
) -> torch.Tensor | NoTensor:
    """A tensor of this size and stride on the values of a storage, or why there is none."""
    if values.is_complex():
        return NoTensor("complex")
    if math.prod(size) > values.numel():
        return NoTensor(f"claims {math.prod(size):,} values, the file has {values.numel():,}")
    return values.as_strided(size, stride, offset)


def no_tensor(problem: str) -> Rule:
    return Rule(lambda *arguments: NoTensor(problem))


RULES = {
    "torch._utils._rebuild_tensor": Rule(strided),
    "torch._utils._rebuild_tensor_v2": Rule(strided),
    "torch._utils._rebuild_parameter": Rule(lambda data, *others: data),
    "torch._utils._rebuild_parameter_with_state": Rule(lambda data, *others: data),
    "torch._utils._rebuild_tensor_v3": no_tensor("of a kind of numbers that no weight has"),
    "torch._utils._rebuild_sparse_tensor": no_tensor("sparse"),
    "torch._utils._rebuild_meta_tensor_no_storage": no_tensor("without values, on the device meta"),
    "torch._utils._rebuild_qtensor": no_tensor("quantised"),
    "torch._utils._rebuild_nested_tensor": no_tensor("nested"),
    "torch._tensor._rebuild_from_type_v2": no_tensor("of a class of its own"),
}
# The configurations of yacs are dictionaries with nothing of their own in them that is needed.
CONTAINERS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "yacs.config.CfgNode")
IGNORED = """argparse.Namespace _codecs.encode __builtin__.set __builtin__.frozenset __builtin__.dict __builtin__.list
    pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath pathlib.PureWindowsPath
    torch.Size torch.device torch.serialization._get_layout torch.storage.UntypedStorage numpy.dtype numpy.ndarray
    numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct numpy._core.multiarray.scalar
    numpy._core.multiarray._reconstruct numpy.dtypes.Float64DType numpy.dtypes.Float32DType
    numpy.dtypes.Int64DType mmengine.logging.history_buffer.HistoryBuffer __builtin__.getattr""".split()
GLOBALS = {
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    **RULES,
    **dict.fromkeys(CONTAINERS, Container),
    **dict.fromkeys(IGNORED, Ignored),
}


class WeightsUnpickler(pickle.Unpickler):
    """Python's unpickler, to which no name is known but those of this module.

    Args:
        stream: at the beginning of a pickle that passed [`check_opcodes`].
        storage: function of dtype, key and number of values that gives these values `(numel,)` of the file.

    Raises:
        Refused: the pickle asks for another name.
    """

    def __init__(self, stream: BinaryIO, storage: Callable[[torch.dtype, str, int], torch.Tensor] | None = None):
        super().__init__(stream, encoding="utf-8")
        self.storage: Any = storage

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in GLOBALS:
            return GLOBALS[full_name]
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.qscheme)):
            return Ignored
        raise Refused(f"asks to run {printable(full_name)} when it is read; refused, nothing was run")

    def persistent_load(self, identity: Any) -> torch.Tensor:
        kind, dtype, key, _, numel = identity[:5]
        if kind != "storage" or not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError("no storage")
        if any(part is not None for part in identity[5:]):
            raise pickle.UnpicklingError("a part of a storage")
        return self.storage(dtype if isinstance(dtype, torch.dtype) else torch.uint8, key, numel)


def check_opcodes(stream: BinaryIO) -> None:
    """Look through a pickle without doing what it says, and go back to its beginning.

    Raises:
        Refused: it has the modules of a network and not only their weights.
        pickle.UnpicklingError: it has opcodes that `torch.save` does not write, or would make the unpickler fill the
            memory: it reserves a place for every number up to the highest that a pickle gives to an object.
    """
    start, classes = stream.tell(), []
    argument: Any
    position: Any
    for step, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if step == MOST_OPCODES:
            raise Refused(f"has more than {MOST_OPCODES:,} names and settings, which are not read")
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name}")
        if opcode.name == "LONG_BINPUT" and argument > position:
            raise pickle.UnpicklingError("a memo of too many places")
        if opcode.name == "LONG1" and argument.bit_length() > 64:  # huge numbers of one hash would make slow keys
            raise pickle.UnpicklingError("a number of too many digits")
        if opcode.name == "GLOBAL":
            classes.append(argument.replace(" ", "."))
    if any(name.startswith("torch.nn.modules.") for name in classes):
        own = [name for name in classes if name not in GLOBALS]
        raise Refused(WHOLE_NETWORK.format(printable(own[0])))
    stream.seek(start)


def unpickle(stream: BinaryIO, storage: Callable[[torch.dtype, str, int], torch.Tensor] | None = None) -> Any:
    check_opcodes(stream)
    return WeightsUnpickler(stream, storage).load()


class Storages:
    """Gives the values of a file, each key's once; the sum of their bytes is limited.

    Args:
        most_bytes: the limit, the size of the file.
    """

    def __init__(self, most_bytes: int):
        self.left: int = most_bytes
        self.made: dict[str, torch.Tensor] = {}

    def __call__(self, dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
        if key not in self.made:
            size = numel * dtype.itemsize
            self.left -= size
            if self.left < 0:
                raise pickle.UnpicklingError("storages that claim more than the file has")
            self.made[key] = torch.empty(size, dtype=torch.uint8)
            self.fill(key)
        values = self.made[key].view(dtype)
        if values.numel() != numel:
            raise pickle.UnpicklingError("a storage of two sizes")
        return values

    def fill(self, key: str) -> None:
        """Read the values of a key at once, where the format allows that."""

    def read_into(self, key: str, file: Any) -> None:
        raw = self.made[key].numpy()
        if file.readinto(raw) != raw.nbytes:
            raise EOFError


class ZipStorages(Storages):
    def __init__(self, archive: zipfile.ZipFile, folder: str, most_bytes: int):
        super().__init__(most_bytes)
        self.archive = archive
        self.folder = folder

    def fill(self, key: str) -> None:
        with self.archive.open(f"{self.folder}/data/{key}") as member:
            self.read_into(key, member)


def read_zip(file: BinaryIO, size: int) -> Any:
    """The content of a file of `torch.save` since torch 1.6: a zip archive without compression."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        folder = next(iter(members)).partition("/")[0]
        if f"{folder}/constants.pkl" in members:
            raise Refused("is damaged or no file of weights (a TorchScript program)")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise Refused("has compressed members, which `torch.save` never writes")
        if len(members) < len(archive.infolist()) or sum(member.file_size for member in members.values()) > size:
            raise Refused(f"has members that claim more than its {size:,} bytes")
        if f"{folder}/byteorder" in members and archive.read(f"{folder}/byteorder") != b"little":
            raise Refused(OTHER_ORDER)
        pickled = members[f"{folder}/data.pkl"]
        if pickled.file_size > MOST_PICKLED:
            raise Refused(f"has {pickled.file_size:,} bytes of names and settings, at most {MOST_PICKLED:,} are read")
        return unpickle(io.BytesIO(archive.read(pickled)), ZipStorages(archive, folder, size))


def read_legacy(file: BinaryIO, size: int) -> Any:
    """The content of a file of `torch.save` before torch 1.6: pickles, then the storages one after the other."""
    stream = io.BytesIO(file.read(len(LEGACY_BEGINNING) + MOST_PICKLED))
    if stream.read(len(LEGACY_BEGINNING)) != LEGACY_BEGINNING:
        raise pickle.UnpicklingError("another beginning")
    if not unpickle(stream)["little_endian"]:
        raise Refused(OTHER_ORDER)
    storages = Storages(size)
    content, keys = unpickle(stream, storages), unpickle(stream)
    if sorted(keys) != sorted(storages.made):
        raise pickle.UnpicklingError("other storages than its tensors have")
    file.seek(stream.tell())
    for key in keys:
        file.read(8)  # the number of values, which the pickle has said already
        storages.read_into(key, file)
    return content


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote: dictionaries, lists, and tensors on the CPU; other objects are left out.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is not a file of `torch.save`, is damaged, asks for more than weights need, or claims more than
            it holds.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no file")
    with open(path, "rb") as file:
        beginning = file.read(16)
        file.seek(0)
        is_zip = beginning.startswith(b"PK\x03\x04")
        if not is_zip and not beginning.startswith(b"\x80"):
            raise ValueError(f"{path} is not a PyTorch file: it begins with {beginning!r}")
        try:
            return (read_zip if is_zip else read_legacy)(file, status.st_size)
        except Refused as refusal:
            raise ValueError(f"{path} {refusal}") from None
        except pickle.UnpicklingError:
            raise ValueError(f"{path} is damaged or asks for more than weights; refused, nothing was run") from None
        except Exception as error:  # a damaged file can make the reader fail anywhere
            raise ValueError(
                f"{path} is damaged or no file of weights ({type(error).__name__} while reading it)"
            ) from None
