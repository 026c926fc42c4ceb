"""What may import what: the package stays light, and its core runs on a machine that has jax, flax, optax and einops only."""

import ast
import json
import pathlib
import subprocess
import sys

CORE = (
    "paths", "predictions", "times", "weights", "guidance", "exact", "config", "rewards", "generate", "objectives", "samplers",
    "samplers.likelihood", "models", "models.flops", "train.step", "train.ema", "train.optim", "train.mesh", "train.roles",
)  # fmt: skip
ALLOWED = {"jax", "jaxlib", "flax", "optax", "einops", "numpy", "flowjax"}

PROBE = """
import sys, json
baseline = set()
allowed, modules = json.loads(sys.argv[1]), json.loads(sys.argv[2])
import jax, flax.linen, optax, einops, jax.scipy.special, optax.contrib
before = set(sys.modules)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names and top not in {m.split(".")[0] for m in before}:
            raise ImportError(f"the core imports {name}")
        # What jax and flax themselves brought along (msgpack, orbax, ...) must not be used by us either.
sys.meta_path.insert(0, Refuse())
for module in modules:
    __import__("flowjax." + module)
used = {v.__name__.split(".")[0] for m in list(sys.modules) if m.startswith("flowjax") for v in vars(sys.modules[m]).values() if type(v) is type(sys)}
print(json.dumps(sorted(used - set(allowed) - set(sys.stdlib_module_names))))
"""


def run(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True).stdout


def test_import_flowjax_loads_nothing_else():
    loaded = run("import sys; before = set(sys.modules); import flowjax; print(sorted(set(sys.modules) - before))")
    assert eval(loaded) == ["flowjax"]


def test_core_needs_only_the_core_libraries():
    assert json.loads(run(PROBE, json.dumps(sorted(ALLOWED)), json.dumps(CORE)).splitlines()[-1]) == []


def test_core_imports_within_two_seconds_beyond_jax():
    code = (
        "import time, jax, flax.linen, optax, optax.contrib; start = time.perf_counter();"
        f"[__import__('flowjax.' + m) for m in {CORE!r}]; print(time.perf_counter() - start)"
    )
    assert min(float(run(code)) for _ in range(2)) < 2.0


ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = ("flowjax", "experiments", "configs", "tools")


def names_of(tree) -> set[str]:
    """What a module's top level binds, in branches and loops too."""
    found, rest = set(), list(tree.body)
    while rest:
        node = rest.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names}
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            rest += [n for field in ("body", "orelse", "handlers", "finalbody") for n in getattr(node, field, [])]
    return found


def test_names_asked_of_our_own_modules_exist():
    """Binaries and studies import late and run long: a name that went would be missed after an hour."""
    trees = {}
    for top in (*OURS, "tests"):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text())
    names = {module: names_of(tree) for module, tree in trees.items()}
    for module in trees:
        above, _, name = module.rpartition(".")
        names.setdefault(above, set()).add(name)  # a package's modules; folders without __init__ among them
    missing = []
    for module, tree in trees.items():
        called = {}  # name in this file -> module of ours
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in OURS:
                for a in node.names:
                    if a.name not in names.get(node.module, ()):
                        missing.append(f"{module}:{node.lineno} {node.module}.{a.name}")
                    if (whole := f"{node.module}.{a.name}") in trees:
                        called[a.asname or a.name] = whole
        also = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        also |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}  # a name that is a variable elsewhere in the file is left alone
        for name in also:
            called.pop(name, None)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name):
                whole = called.get(node.value.id)
                if whole and node.attr not in names[whole] and not node.attr.startswith("__"):
                    missing.append(f"{module}:{node.lineno} {whole}.{node.attr}")
    assert missing == []
