"""Change one sign, operator or constant at a time and require that a test fails.

    python -m tools.mutate                          # every mutation of the mathematics, objectives and samplers: an hour
    python -m tools.mutate --files objectives/      # files whose path contains one of these
    python -m tools.mutate --files times.py:75-90   # so many lines of them
    python -m tools.mutate --sample 100 --seed 1    # a random part
    python -m tools.mutate --list                   # what would be changed

Mutations are made in copies of the tree, one per job; the working tree is only read. Each runs, in a process forked from one that has
imported jax already, those fast tests of the files that TESTS maps its file to which enter the mutated function (all of them where it
is outside of a function's body, and with --thorough: what a test found compiled already, it does not enter): those first that caught
a mutation of the same file before, then the quickest. A mutation that no test notices is printed as `file:line  old -> new` and makes
the exit status 1, unless tools/mutate_allow.txt says why it changes nothing, which is believed but with --thorough. Tests that fail
without a mutation are named and left out.
"""

import argparse
import ast
import builtins
import collections
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
ALLOWED = ROOT / "tools" / "mutate_allow.txt"
COPIED = ("flowjax", "tests", "configs", "experiments", "tools", "pytest.ini", "setup.py")
PRELOADED = ("jax", "jax.numpy", "jax.scipy.special", "flax.linen", "optax", "scipy.stats", "scipy.integrate", "pytest", "orbax.checkpoint.v1")

SAMPLERS = ["test_samplers", "test_samplers_stochastic"]
# file or folder -> test files, without tests/ and .py; the longest match counts
TESTS = {
    "flowjax/paths.py": ["test_paths"],
    "flowjax/predictions.py": ["test_predictions", "test_input_scaling"],
    "flowjax/times.py": ["test_times", "test_objectives_consistency"],
    "flowjax/weights.py": ["test_weights"],
    "flowjax/guidance.py": ["test_guidance"],
    "flowjax/exact.py": ["test_exact"],
    "flowjax/generate.py": ["test_generate"],
    "flowjax/rewards.py": ["test_rewards", "test_objectives_reward_model"],
    "flowjax/models/half.py": ["test_half"],
    "flowjax/objectives": ["test_objectives_table"],
    "flowjax/objectives/add.py": ["test_objectives_add", "test_objectives_table"],
    "flowjax/objectives/adversarial.py": ["test_objectives_add", "test_objectives_vae_gan"],
    "flowjax/objectives/base.py": ["test_objectives_flow_matching", "test_objectives_table"],
    "flowjax/objectives/classification.py": ["test_objectives_classification", "test_objectives_table"],
    "flowjax/objectives/consistency.py": ["test_objectives_consistency", "test_objectives_table"],
    "flowjax/objectives/contrastive.py": ["test_objectives_contrastive", "test_objectives_table"],
    "flowjax/objectives/dmd.py": ["test_objectives_dmd", "test_objectives_add", "test_objectives_table"],
    "flowjax/objectives/dpo.py": ["test_objectives_dpo", "test_objectives_table"],
    "flowjax/objectives/flow_map.py": ["test_objectives_flow_map", "test_objectives_table"],
    "flowjax/objectives/flow_matching.py": ["test_objectives_flow_matching", "test_objectives_table", "test_dreambooth"],
    "flowjax/objectives/groups.py": ["test_objectives_grpo", "test_objectives_nft"],
    "flowjax/objectives/grpo.py": ["test_objectives_grpo", "test_objectives_table"],
    "flowjax/objectives/nft.py": ["test_objectives_nft", "test_objectives_table"],
    "flowjax/objectives/reward_feedback.py": ["test_objectives_reward_feedback", "test_objectives_table"],
    "flowjax/objectives/guidance_distillation.py": ["test_objectives_guidance_distillation", "test_objectives_table"],
    "flowjax/objectives/imm.py": ["test_objectives_imm", "test_objectives_table"],
    "flowjax/objectives/lcm.py": ["test_objectives_lcm", "test_objectives_table"],
    "flowjax/objectives/moment.py": ["test_objectives_moment", "test_objectives_table"],
    "flowjax/objectives/progressive.py": ["test_objectives_progressive", "test_objectives_table"],
    "flowjax/objectives/reward_model.py": ["test_objectives_reward_model", "test_objectives_table"],
    "flowjax/objectives/scm.py": ["test_objectives_scm", "test_objectives_table"],
    "flowjax/objectives/vae.py": ["test_objectives_vae", "test_objectives_table"],
    "flowjax/samplers": SAMPLERS,
    "flowjax/samplers/likelihood.py": ["test_likelihood"],
    "flowjax/train/lora.py": ["test_train_lora"],
}

OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.Pow: ("**", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
    ast.Lt: ("<", ">"), ast.Gt: (">", "<"), ast.LtE: ("<=", ">="), ast.GtE: (">=", "<="), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
TWINS = [("minimum", "maximum"), ("min", "max"), ("argmin", "argmax"), ("sin", "cos"), ("floor", "ceil"), ("any", "all")]
TWINS = dict(TWINS) | {b: a for a, b in TWINS}


class Mutation(NamedTuple):
    """Bytes [start, stop) of a file replaced by `new`."""

    path: str
    start: int
    stop: int
    new: bytes

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new + source[self.stop :]

    def mutated_line(self, source: bytes) -> str:
        return self.apply(source).split(b"\n")[source.count(b"\n", 0, self.start)].strip().decode()

    def describe(self, source: bytes) -> str:
        """file:line  old -> new   the new line."""
        line, old = source.count(b"\n", 0, self.start) + 1, source[self.start : self.stop]
        return f"{self.path}:{line}  {old.decode()} -> {self.new.decode() or '(nothing)'}   {self.mutated_line(source)}"

    def key(self, source: bytes) -> str:
        """What the allow-list calls it: the file and the mutated line, which survives edits elsewhere in the file."""
        return f"{self.path}: {self.mutated_line(source)}"


class Finder(ast.NodeVisitor):
    """Collects the mutations of one file."""

    def __init__(self, path: str, source: bytes):
        self.path, self.source, self.found = path, source, []
        self.lines = [0]
        for line in source.split(b"\n"):
            self.lines.append(self.lines[-1] + len(line) + 1)
        self.visit(ast.parse(source))

    def span(self, node):
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def add(self, start, stop, new):
        self.found.append(Mutation(self.path, start, stop, new.encode()))

    def swap(self, left, operator, right):
        """Replace the operator that stands between two operands."""
        if type(operator) in OPERATORS:
            old, new = OPERATORS[type(operator)]
            stop, start = self.span(left)[1], self.span(right)[0]
            at = self.source.index(old.encode(), stop, start)
            self.add(at, at + len(old), new)

    # What is not arithmetic: annotations, messages, text.

    def visit_Raise(self, node):
        pass

    def visit_JoinedStr(self, node):
        pass

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_arg(self, node):
        pass

    def visit_FunctionDef(self, node):
        for child in [*node.args.defaults, *(d for d in node.args.kw_defaults if d), *node.body]:
            self.visit(child)

    # What is.

    def visit_BinOp(self, node):
        if not any(isinstance(n, ast.JoinedStr) or isinstance(getattr(n, "value", None), str) for n in (node.left, node.right)):
            self.swap(node.left, node.op, node.right)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:]):
            self.swap(left, node.op, right)
        self.generic_visit(node)

    def visit_Compare(self, node):
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators):
            self.swap(left, operator, right)
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.swap(node.target, node.op, node.value)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, (ast.USub, ast.Not)):
            self.add(self.span(node)[0], self.span(node.operand)[0], "")
        self.generic_visit(node)

    def visit_Constant(self, node):
        value = node.value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            # A tiny float guards a division; another tiny one guards as well.
            if isinstance(value, int) or value == 0 or abs(value) > 1e-5:
                self.add(*self.span(node), repr(value + 1 if isinstance(value, int) else value * 1.25 or 0.5))

    def visit_Attribute(self, node):
        if node.attr in TWINS and isinstance(node.value, ast.Name) and node.value.id in ("jnp", "np", "math"):
            stop = self.span(node)[1]
            self.add(stop - len(node.attr), stop, TWINS[node.attr])
        self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Name) and node.func.id in TWINS:
            self.add(*self.span(node.func), TWINS[node.func.id])
        if isinstance(node.func, ast.Attribute) and node.func.attr == "stop_gradient":
            self.add(*self.span(node.func), "")
        self.generic_visit(node)


def functions(source: bytes) -> list:
    """The functions and lambdas of a source file, the inner after the outer."""
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    return sorted(found, key=lambda n: (n.lineno, n.col_offset))


def function_of(m: Mutation, source: bytes) -> tuple[str | None, bool]:
    """The function that a mutation is in, as `marked` calls it, or None; and whether only who enters it can notice, which is not so of
    a default, that a test may read."""
    place = source.count(b"\n", 0, m.start) + 1, m.start - (source.rfind(b"\n", 0, m.start) + 1)
    around = [n for n in functions(source) if (n.lineno, n.col_offset) <= place < (n.end_lineno, n.end_col_offset)]
    if not around:
        return None, False
    body = around[-1].body if isinstance(around[-1], ast.Lambda) else around[-1].body[0]
    return f"{m.path}:{around[-1].lineno}:{around[-1].col_offset}", place >= (body.lineno, body.col_offset)


def marked(path: str, source: bytes) -> bytes:
    """The source whose functions say when they are entered."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            name = f"{path}:{node.lineno}:{node.col_offset}"
            note = ast.parse(f"getattr(__import__('builtins'), 'entered', set()).add({name!r})").body[0]
            if isinstance(node, ast.Lambda):
                node.body = ast.Subscript(ast.Tuple([note.value, node.body], ast.Load()), ast.Constant(1), ast.Load())
            else:
                node.body.insert(1 if ast.get_docstring(node) is not None else 0, note)
    return ast.unparse(ast.fix_missing_locations(tree)).encode()


def tests_of(path: str) -> list[str]:
    """The test files that a source file is mapped to."""
    best = max((k for k in TESTS if path.startswith(k)), key=len)
    return [f"tests/{name}.py" for name in TESTS[best] if (ROOT / f"tests/{name}.py").exists()]


def sources() -> list[str]:
    """The files of TESTS and those in its folders."""
    files = [ROOT / k for k in TESTS if k.endswith(".py")] + [f for k in TESTS if not k.endswith(".py") for f in (ROOT / k).glob("*.py")]
    return sorted({str(f.relative_to(ROOT)) for f in files})


class Order:
    """pytest plugin: the tests most likely to fail first; durations, the first failure and who entered which marked function are
    written to a file."""

    def __init__(self, out, first=None, left_out=(), wanted=None):
        self.out, self.first, self.left_out, self.wanted = out, first, left_out, wanted
        self.report = {"seconds": collections.defaultdict(float), "failed": [], "entered": collections.defaultdict(list)}
        builtins.entered = set()

    def note(self, who):
        """What was entered since the last time, by a test or, in what tests share, by a file of them."""
        for function in builtins.entered:
            if who not in self.report["entered"][function]:
                self.report["entered"][function].append(who)
        builtins.entered.clear()

    def pytest_runtest_logstart(self, nodeid):
        self.note(nodeid.split("::")[0])

    def pytest_collection_modifyitems(self, items):
        if self.wanted and (wanted := [i for i in items if i.nodeid in self.wanted or i.nodeid.split("::")[0] in self.wanted]):
            items[:] = wanted
        items[:] = [item for item in items if item.nodeid not in self.left_out]
        if self.first:
            items.sort(key=lambda item: self.first(item.nodeid))

    def pytest_runtest_logreport(self, report):
        self.report["seconds"][report.nodeid] += report.duration
        self.note(report.nodeid if report.when == "call" else report.nodeid.split("::")[0])
        if report.failed:
            self.report["failed"].append(report.nodeid)

    def pytest_sessionfinish(self):
        self.out.write_text(json.dumps(self.report))


class Slot:
    """One copy of the tree and the process that works in it."""

    def __init__(self, root: pathlib.Path):
        self.root, self.pid, self.writes = root, None, 0
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                root.mkdir(exist_ok=True)
                shutil.copy(source, root / name)

    def write(self, path, content: bytes):
        """Replace a source file, with a time of its own: compiled modules are recognised by whole seconds and size."""
        self.writes += 1
        (self.root / path).write_bytes(content)
        os.utime(self.root / path, (self.writes, self.writes))

    def start(self, tests, seconds, only, *, stop_early=True, **order):
        """Fork a process that runs the tests on this copy."""
        self.out, self.limit = self.root / "report.json", time.monotonic() + seconds
        self.out.unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # jax warns of forks; its backend has not started yet
            self.pid = os.fork()
        if self.pid:
            return
        code = 3
        with contextlib.suppress(BaseException):
            os.setsid()
            os.chdir(self.root)
            sys.path.insert(0, str(self.root))
            with open(self.root / "log.txt", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            import pytest

            assert pathlib.Path(importlib.util.find_spec("flowjax").origin).is_relative_to(self.root), "another flowjax is in the way"
            options = ["-q", "-m", "not slow", "-k", only, "-p", "no:cacheprovider", "-p", "no:warnings", "--tb=line"]
            options += ["-x"] * stop_early
            code = int(pytest.main([*options, *tests], plugins=[Order(self.out, **order)]))
        os._exit(code)

    def poll(self):
        """None while it runs, else (exit status or "timeout", report)."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        late = not pid and time.monotonic() > self.limit
        if late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        elif not pid:
            return None
        self.pid = None
        report = json.loads(self.out.read_text()) if self.out.exists() else {"seconds": {}, "failed": [], "entered": {}}
        return ("timeout" if late else os.waitstatus_to_exitcode(status)), report


def prepare_process(cache: pathlib.Path, tests: pathlib.Path):
    """Import what all tests import, in their environment, so that a fork need not; the compile cache is shared by all mutations."""
    os.environ.update(JAX_COMPILATION_CACHE_DIR=str(cache.absolute()), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]
    exec(compile((tests / "conftest.py").read_text(), tests / "conftest.py", "exec"), {"__file__": str(tests / "conftest.py")})
    for name in PRELOADED:
        with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(name)
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized() and "flowjax" not in sys.modules, "a fork must start its own backend"


def baseline(slots, files, only):
    """({test: seconds}, {failing tests}, {function: tests, and files of tests, that enter it}) of the marked tree."""
    seconds, failing, entered = {}, set(), collections.defaultdict(set)
    waiting, running = list(reversed(files)), {}
    while waiting or running:
        for slot in slots:
            if slot.pid is None and waiting:
                running[slot] = waiting.pop()
                slot.start([running[slot]], 1200, only, stop_early=False)
            elif slot in running and (done := slot.poll()) is not None:
                file, (code, report) = running.pop(slot), done
                if code not in (0, 1, 5):  # 5: `only` leaves none
                    sys.exit(f"{file} does not run on the unchanged tree ({code}):\n{(slot.root / 'log.txt').read_text()[-3000:]}")
                seconds |= report["seconds"]
                failing |= {*report["failed"]}
                for function, tests in report["entered"].items():
                    entered[function] |= {*tests}
                print(f"{file}: {len(report['seconds'])} tests, {sum(report['seconds'].values()):.0f} s", flush=True)
        time.sleep(0.02)
    for test in sorted(failing):
        print(f"left out, as it fails without a mutation: {test}")
    return seconds, failing, entered


def run(mutations, text, jobs: int, cache: str = "", thorough: bool = False, only: str = ""):
    """Yield (mutation, exit status, first failing test or None) as they finish."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        scratch = pathlib.Path(scratch)
        slots = [Slot(scratch / f"tree{i}") for i in range(jobs)]
        prepare_process(pathlib.Path(cache) if cache else scratch / "cache", slots[0].root / "tests")
        for slot in slots:
            for path in {m.path for m in mutations}:
                slot.write(path, marked(path, text[path]))
        seconds, failing, entered = baseline(slots, sorted({t for m in mutations for t in tests_of(m.path)}), only)
        for slot in slots:
            for path in {m.path for m in mutations}:
                slot.write(path, text[path])
        caught = collections.defaultdict(collections.Counter)
        waiting, running = list(reversed(mutations)), {}
        try:
            while waiting or running:
                for slot in slots:
                    if slot.pid is None and waiting:
                        m = waiting.pop()
                        tests = tests_of(m.path)
                        limit = 60 + 4 * sum(s for t, s in seconds.items() if t.split("::")[0] in tests)
                        slot.write(m.path, m.apply(text[m.path]))
                        running[slot] = m
                        function, inside = function_of(m, text[m.path])
                        enter = entered.get(function, ())
                        wanted = enter if inside and not thorough else None

                        def first(test, counts=caught[m.path], enter=enter):
                            return -counts[test], not {test, test.split("::")[0]} & {*enter}, seconds.get(test, 0.0)

                        slot.start(tests, limit, only, first=first, left_out=failing, wanted=wanted)
                    elif slot in running and (done := slot.poll()) is not None:
                        m = running.pop(slot)
                        slot.write(m.path, text[m.path])
                        code, report = done
                        caught[m.path].update(report["failed"][:1])
                        yield m, code, (report["failed"] or [None])[0]
                time.sleep(0.02)
        finally:
            for slot in running:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.killpg(slot.pid, signal.SIGKILL)
                    os.waitpid(slot.pid, 0)


def chosen(m: Mutation, source: bytes, part: str) -> bool:
    """Whether a mutation is in `part` of a path, or in PART:FIRST-LAST."""
    path, _, lines = part.partition(":")
    first, _, last = lines.partition("-")
    return path in m.path and (not lines or int(first) <= source.count(b"\n", 0, m.start) + 1 <= int(last or first))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="*", default=[""], help="only files whose path contains one of these, or lines of them: PART:FIRST-LAST")
    parser.add_argument("--sample", type=int, default=0, help="so many mutations drawn at random (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--cache", default="", help="a folder that keeps compiled programs for the next time")
    parser.add_argument("--tests", default="", help="pytest's -k: only these of the tests")
    parser.add_argument("--thorough", action="store_true", help="run all tests of a file, and what is allowed to survive as well")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    options = parser.parse_args()

    text = {f: (ROOT / f).read_bytes() for f in sources() if any(part.partition(":")[0] in f for part in options.files)}
    mutations = [m for f, source in text.items() for m in Finder(f, source).found if any(chosen(m, source, part) for part in options.files)]
    untested = sorted({m.path for m in mutations if not tests_of(m.path)})
    mutations = [m for m in mutations if m.path not in untested]
    if options.sample:
        mutations = sorted(random.Random(options.seed).sample(mutations, min(options.sample, len(mutations))))
    for path in untested:
        print(f"no test file of {path} exists")
    if options.list:
        print("\n".join(m.describe(text[m.path]) for m in mutations))
        return
    allowed = {line.split("  ## ")[0].strip() for line in ALLOWED.read_text().splitlines() if line and line[0] != "#"}
    survivors, table, start = [], collections.defaultdict(collections.Counter), time.monotonic()
    if not options.thorough:
        believed = [m for m in mutations if m.key(text[m.path]) in allowed]
        for m in believed:
            table[m.path]["allowed"] += 1
        mutations = [m for m in mutations if m not in believed]
    print(f"{len(mutations)} mutations in {len(text) - len(untested)} files", flush=True)
    for i, (m, code, test) in enumerate(run(mutations, text, options.jobs, options.cache, options.thorough, options.tests), 1):
        said = m.describe(text[m.path])
        fate = "timeout" if code == "timeout" else "killed" if code else "allowed" if m.key(text[m.path]) in allowed else "survived"
        table[m.path][fate] += 1
        if fate == "survived":
            survivors.append(said)
        if fate in ("survived", "timeout"):
            print(f"{fate}: {said}", flush=True)
        if i % 50 == 0:
            print(f"{i} of {len(mutations)}, {(time.monotonic() - start) / i:.1f} s each", flush=True)
    print(f"{'file':44}{'killed':>9}{'timeout':>9}{'allowed':>9}{'survived':>9}")
    for path, fates in [*sorted(table.items()), ("total", sum(table.values(), collections.Counter()))]:
        print(f"{path:44}" + "".join(f"{fates[k]:9}" for k in ("killed", "timeout", "allowed", "survived")))
    print("\n".join(["survivors:", *survivors]) if survivors else "every mutation was noticed")
    sys.exit(bool(survivors or untested))


if __name__ == "__main__":
    main()
