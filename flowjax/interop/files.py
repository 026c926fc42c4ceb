"""State dicts on disk: safetensors in one file or in shards with an index, as diffusers and transformers keep them.

Reading: the tensors are views into the files (float32, float16, bfloat16 or integers, as stored), brought to memory when they
are touched. Writing: one shard is converted and written at a time.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from flowjax.config import ConfigError, lookup

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32}
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TORCH = (".pt", ".pth", ".bin", ".ckpt")
SHARD = 5_000_000_000  # bytes


def read(where, stem: str) -> dict[str, np.ndarray]:
    """Every tensor of a file, or of the folder that holds <stem>.safetensors or <stem>.safetensors.index.json with its shards.

    A file of PyTorch's (.pt, ...) needs torch; of a training state, its "ema" is read.
    """
    where = pathlib.Path(where)
    if where.is_file():
        return _read_torch(where) if where.suffix in TORCH else tensors(where)
    whole, index = where / f"{stem}.safetensors", where / f"{stem}.safetensors.index.json"
    if whole.exists() and index.exists():
        raise ConfigError(f"{where} holds both {whole.name} and {index.name}; remove the one that is not meant")
    if whole.exists():
        return tensors(whole)
    if not index.exists():
        there = sorted(p.name for p in where.glob("*")) if where.is_dir() else "no such file or folder"
        raise ConfigError(f"{where} has neither {whole.name} nor {index.name}: {there}")
    return _sharded(where, index)


def _sharded(folder, index):
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise ConfigError(f"{index} has no weight_map")
    state = {}
    for name in sorted({*places.values()}):
        if pathlib.PurePath(name).name != name or not (folder / name).exists():
            raise ConfigError(f"{index} names {name!r}, which is not in {folder}")
        state |= {key: (name, value) for key, value in tensors(folder / name).items()}
    wrong = sorted(key for key in {*places, *state} if key not in places or state.get(key, ("",))[0] != places[key])
    if wrong:
        raise ConfigError(f"{index} and its shards disagree on {', '.join(wrong)}")
    return {key: value for key, (_, value) in state.items()}


def tensors(file) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, as read-only views into it."""
    return _opened(pathlib.Path(file))[0]


def metadata(file) -> dict[str, str]:
    """The words in the header of a safetensors file."""
    return _opened(pathlib.Path(file))[1]


def _opened(file):
    try:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size)) if size < file.stat().st_size else None
        said = header.pop("__metadata__", None) or {}
        data = np.memmap(file, np.uint8, "r", offset=8 + size)
        state = {name: _view(file, data, name, entry) for name, entry in header.items()}
        if sum(value.nbytes for value in state.values()) != len(data):
            raise ValueError("it holds bytes of no tensor")
        return state, said
    except ConfigError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no safetensors file, or a damaged one ({error})") from None


def _view(file, data, name, entry):
    dtype = np.dtype(lookup(DTYPES, entry["dtype"], f"{file}: dtype of {name}"))
    first, end = entry["data_offsets"]
    if not 0 <= first <= end <= len(data) or end - first != dtype.itemsize * int(np.prod(entry["shape"], dtype=np.int64)):
        raise ValueError(f"the bytes of {name} are not there")
    return data[first:end].view(dtype).reshape(entry["shape"])


def _read_torch(file):
    try:
        import torch
    except ImportError:
        raise ConfigError(f"{file} needs torch to be read: install it, or save the state dict as safetensors") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what pickles raise has many types
        raise ConfigError(f"{file} cannot be loaded with weights_only: {str(error).splitlines()[0]}") from None
    state = state.get("ema", state) if isinstance(state, Mapping) else {"": state}
    if odd := [key for key, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ConfigError(f"{file} is no state dict: {', '.join(map(str, odd[:8]))} are no tensors")
    return {key: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for key, v in state.items()}


def read_json(file) -> dict:
    """A JSON file that holds one object."""
    try:
        return parse(pathlib.Path(file).read_text(), file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None


def parse(text: str, where) -> dict:
    """JSON text of one object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} should hold one JSON object")
    return value


def write(folder, stem: str, state: Mapping[str, np.ndarray], dtype: str = "float32", shard: int = SHARD):
    """Write a state dict as <stem>.safetensors, or in shards of at most `shard` bytes (or one tensor) with their index.

    dtype: "float32", "float16" or "bfloat16", to which tensors are rounded; ConfigError where one does not fit float16.
    """
    from safetensors.numpy import save_file

    folder, to = pathlib.Path(folder), np.dtype(lookup(FLOATS, dtype, "dtype"))
    parts, size = [[]], 0
    for key, value in state.items():
        bytes_ = value.size * to.itemsize
        if parts[-1] and size + bytes_ > shard:
            parts.append([])
            size = 0
        parts[-1].append(key)
        size += bytes_
    names = [f"{stem}.safetensors"]
    if len(parts) > 1:
        names = [f"{stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for name, keys in zip(names, parts, strict=True):
        # "pt" is the layout of the tensors, which transformers asks for; they are contiguous, as safetensors wants them.
        save_file({key: _rounded(key, state[key], to) for key in keys}, folder / name, metadata={"format": "pt"})
    if len(parts) > 1:
        total = sum(value.size for value in state.values()) * to.itemsize
        weight_map = {key: name for name, keys in zip(names, parts, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def packed(state: Mapping[str, np.ndarray], words: Mapping[str, str]) -> bytes:
    """A safetensors file of float32 tensors and header words, always the same for the same content: the library's own has the
    words in any order."""
    header, parts, end = {"__metadata__": dict(sorted(words.items()))}, [], 0
    for key in sorted(state):
        parts.append(np.ascontiguousarray(state[key], np.dtype("<f4")).tobytes())
        header[key] = {"dtype": "F32", "shape": list(np.shape(state[key])), "data_offsets": [end, end := end + len(parts[-1])]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _rounded(key, value, dtype):
    with np.errstate(over="ignore"):
        new = np.ascontiguousarray(np.asarray(value), dtype=dtype).reshape(value.shape)
    if not np.isfinite(new.astype(np.float32)).all() and np.isfinite(value).all():
        raise ConfigError(f"{key} has values beyond {dtype}; write float32 or bfloat16")
    return new


@contextlib.contextmanager
def whole(out):
    """A new folder that becomes `out` when all went well, and leaves no trace otherwise. ConfigError where `out` exists."""
    out = pathlib.Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; choose another place, or remove it")
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
