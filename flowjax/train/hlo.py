"""What a compiled program does, read from its HLO text: collectives and matrix products, loops counted as often as they turn.

The compiler's own cost analysis counts the body of a loop once and knows nothing of collectives; networks whose layers are
scanned need the multiplication.
"""

import math
import operator
import re
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1, "s4": 1, "u4": 1, "c64": 8, "c128": 16, "token": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)")


class Instruction(NamedTuple):
    """One line of HLO. `shape` and `rest` (operands and attributes) are text; `turns`: how often a step executes it; `loops`: how
    often the loop around it turns, which is less where several instructions call its computation."""

    name: str
    shape: str
    opcode: str
    rest: str
    computation: str
    turns: int
    loops: int


class Collective(NamedTuple):
    """One exchange. bytes: of the whole array over the group, per turn; group: devices that take part; turns: per step; members: the
    first group's places in the mesh, row by row, or () where all devices pass something on to one another."""

    kind: str
    bytes: int
    group: int
    turns: int
    where: str
    members: tuple[int, ...] = ()

    @property
    def sent(self) -> float:
        """Bytes that a device sends per step when the exchange goes round a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.kind, share)
        return self.turns * factor * self.bytes


def size(shape: str) -> int:
    """Bytes of "f32[2,3]{1,0}" or of all elements of a tuple."""
    return sum(BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in _ARRAY.findall(shape) if kind in BYTES)


def dims(shape: str) -> list[int]:
    """[2, 3] of "f32[2,3]{1,0}"."""
    return [int(n) for n in _ARRAY.search(shape)[2].split(",") if n]


def instructions(text: str) -> list[Instruction]:
    """Every instruction of a compiled module's text, fused ones too."""
    bodies, roots, entry, name = {}, {}, None, None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            bodies[name], entry = [], name if header[1] else entry
        elif name and " = " in line:
            bodies[name].append(_parse(line))
            if line.lstrip().startswith("ROOT "):
                roots[name] = bodies[name][-1]
    turns, loops = (_turns(bodies, roots, entry, merge) for merge in (operator.add, max))
    return [Instruction(*line, name, turns[name], loops[name]) for name, lines in bodies.items() if turns.get(name) for line in lines]


def _parse(line: str):
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    depth, end = 0, 0
    for end, char in enumerate(rest):  # the shape ends at the first blank outside brackets
        depth += (char in "([{") - (char in ")]}")
        if char == " " and not depth:
            break
    shape, rest = rest[:end], rest[end + 1 :]
    opcode, _, rest = rest.partition("(")
    return name.lstrip("%"), re.sub(r"/\*.*?\*/", "", shape), opcode, rest


def _turns(bodies, roots, entry, merge) -> dict[str, int]:
    """How often each computation runs per step; merge: what several callers amount to."""
    calls = {name: [] for name in bodies}  # computation -> [(called, times)]
    for name, lines in bodies.items():
        for _, _, opcode, rest in lines:
            found = {k: re.findall(r"[\w.\-]+", v) for k, v in _CALLED.findall(rest)}
            times = _trip_count(rest, found["condition"][0], found["body"][0], bodies, roots) if opcode == "while" else 1
            calls[name] += [(callee, times) for group in found.values() for callee in group if callee in bodies]
    turns, order, seen = {entry: 1}, [], set()

    def visit(name):
        if name not in seen:
            seen.add(name)
            for callee, _ in calls[name]:
                visit(callee)
            order.append(name)

    visit(entry)
    for name in reversed(order):  # callers before what they call
        for callee, times in calls[name]:
            turns[callee] = merge(turns.get(callee, 0), turns[name] * times)
    return turns


def _trip_count(rest, condition, body, bodies, roots) -> int:
    """Turns of a loop `for (i = 0; i < bound; i += step)`; the compiler may have unrolled it, so that step is not 1."""
    if known := re.search(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', rest):
        return int(known[1])
    constants = {name: int(found[1]) for name, _, opcode, text in bodies[condition] if opcode == "constant" and (found := re.match(r"(\d+)\)", text))}
    bound = max(constants.values(), default=1)
    # The counter: the element of the carry that the condition compares with the bound.
    indices = {name: _element(text) for name, _, opcode, text in bodies[condition] if opcode == "get-tuple-element"}
    compared = [indices[n] for n in _names(roots[condition][3]) if n in indices]
    if len(compared) != 1 or roots[condition][2] != "compare":
        return bound
    lines = {name: (opcode, text) for name, _, opcode, text in bodies[body]}
    name, step = _names(roots[body][3])[compared[0]], 0
    while lines.get(name, ("",))[0] in ("add", "copy"):
        if lines[name][0] == "copy":  # the compiler moves even counters about
            name = _names(lines[name][1])[0]
            continue
        added = [n for n in _names(lines[name][1])[:2] if lines.get(n, ("",))[0] == "constant"]
        others = [n for n in _names(lines[name][1])[:2] if n not in added]
        if len(added) != 1:
            return bound
        step += int(re.match(r"(\d+)\)", lines[added[0]][1])[1])
        name = others[0]
    return -(-bound // step) if step else bound


def _names(rest: str) -> list[str]:
    """Names of the operands."""
    return re.findall(r"%([\w.\-]+)", rest.split("), ")[0])


def _element(rest: str) -> int:
    return int(re.search(r"index=(\d+)", rest)[1])


def collectives(text: str, devices: int) -> list[Collective]:
    """The exchanges of a compiled module for `devices` devices.

    TPU programs write a reduce-scatter as an all-reduce within a computation of that name. One that is fused with the arithmetic
    around it appears in several computations, or in one that several fusions call, or piece by piece in a loop; the channel
    tells that it is the same, and the place where it turns least how often it is made.
    """
    found = {}
    for i, op in enumerate(instructions(text)):
        kind = op.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        scatter = kind == "reduce-scatter" or (kind == "all-reduce" and "reduce-scatter" in op.computation)
        members = () if kind == "collective-permute" else _members(op.rest) or tuple(range(devices))
        group = len(members) or devices
        arrays = [size(f"{k}[{d}]") for k, d in _ARRAY.findall(op.shape)]
        if op.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]  # (operands, results) and (operand, result, ...)
        whole = sum(arrays) * (group if kind == "reduce-scatter" else 1)
        channel = re.search(r"channel_id=(\d+)", op.rest)
        where = re.search(r'op_name="([^"]*)"', op.rest)
        turns = op.loops if channel else op.turns
        one = Collective("reduce-scatter" if scatter else kind, whole, group, turns, where[1] if where else op.name, members)
        key = (kind, int(channel[1])) if channel else ("", i)
        if key not in found or found[key].turns > one.turns:
            found[key] = one
    return [c for c in found.values() if c.group > 1]


def _members(rest: str) -> tuple[int, ...]:
    """The first of `replica_groups`, which are listed, or the rows of a numbered box that is turned, or axes of a mesh."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?)\))?\s*\{([^}]*)\}", rest):
        sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = _box(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
        kept = re.findall(r"'([^']+)'", named[3])
        corner = tuple(slice(None) if axis in kept else 0 for axis in sizes)
        return tuple(ids.reshape(*sizes.values())[corner].ravel().tolist())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(int(n) for n in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+)", rest):
        return tuple(_box(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    return ()


def _box(text: str) -> np.ndarray:
    """0, 1, 2, ... in the order of "[2,4]T(1,0)": a box of that shape, its axes turned."""
    shape, turned = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(n) for n in turned.split(",")]) if turned else ids).ravel()


def flops(text: str) -> int:
    """Floating-point operations of the matrix products and convolutions that ONE device executes per step (a multiply-add is two)."""
    ops = instructions(text)
    shapes = {(op.computation, op.name): op.shape for op in ops}
    total = 0
    for op in ops:
        if op.opcode not in ("dot", "convolution"):
            continue
        lhs, rhs = (dims(shape) for shape in _operands(op, shapes))
        out = math.prod(dims(op.shape))
        if op.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)[1]
            total += 2 * op.turns * out * math.prod(lhs[int(i)] for i in contracted.split(",") if i)
        else:
            total += 2 * op.turns * _convolution(op, lhs, rhs)
    return total


def _operands(op, shapes):
    """Shapes of the two operands, which stand before the names or at the instructions of those names."""
    written = _ARRAY.findall(op.rest.split("), ")[0])
    if len(written) == 2:
        return [f"{k}[{d}]" for k, d in written]
    return [shapes[op.computation, name] for name in _names(op.rest)[:2]]


def _convolution(op, lhs, rhs) -> int:
    """Multiply-adds; products with padding and with the zeros of a dilated input do not count (the TPU writes batched matrix
    products as convolutions over such zeros)."""
    left, right, result = re.search(r"dim_labels=(\w+?)_(\w+?)->(\w+)", op.rest).groups()
    out = dims(op.shape)
    pairs = 1
    window = {k: v.split("x") for k, v in re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", op.rest) or [None, ""])[1])}
    for i, label in enumerate(sorted(c for c in right if c.isdigit())):
        number = lambda key, default, i=i: int(window[key][i]) if key in window else default  # noqa: E731
        low = int(window["pad"][i].split("_")[0]) if "pad" in window else 0
        stride, inner, outer = number("stride", 1), number("lhs_dilate", 1), number("rhs_dilate", 1)
        last = (lhs[left.index(label)] - 1) * inner
        count = 0
        for o in range(out[result.index(label)]):
            positions = (o * stride + k * outer - low for k in range(rhs[right.index(label)]))
            count += sum(0 <= p <= last and p % inner == 0 for p in positions)
        pairs *= count
    # The kernel's input features are those of one group already.
    groups = re.search(r"batch_group_count=(\d+)", op.rest)
    return pairs * out[result.index("b")] * out[result.index("f")] * rhs[right.index("i")] // (int(groups[1]) if groups else 1)
