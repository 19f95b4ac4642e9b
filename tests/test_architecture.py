"""The shape of the house: who imports whom, who may touch global state, how large a file may grow.

Each check takes one parsed file and gives a list of complaints, so that every check is also shown to complain.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastres"
MAX_LINES = 350

# Left to right: a module imports only from layers left of its own, or within its package. A name stands for the module
# or the whole package; a longer name (models.depth) goes before its package's.
LAYERS = (
    ("errors", "machine", "plots", "bench"),  # the packages: a module of theirs gets a place of its own
    ("files", "models.depth", "data.imageset", "machine.host", "clock", "machine.driver", "machine.memory"),
    ("configtree", "native", "machine.gpu"),
    ("config", "plots.series"),
    ("runtime", "optim", "shadow", "models", "data"),
    ("checkpoint", "cudagraph", "machine.environment", "native.fusednet"),
    ("native.layernet",),
    ("evaluator",),
    ("rundir",),
    ("runfolders",),
    ("console", "plots.curves", "sweepdir"),
    ("step", "steptimer", "plots.runs"),
    ("bench.roofline",),
    ("build", "weights"),
    ("runstate", "result", "guards", "machine.checks"),
    ("resolve",),
    ("machine.nvml", "bench.parts", "machine.doctor"),
    ("member", "pace", "bench.cells"),
    ("loop", "bench.measure", "evaluate"),
    ("bench.report", "bench.profiling", "responses", "predict"),
    ("bench.scaling",),
    ("sweep",),
    ("reproduce",),
    ("cli",),
    ("__main__",),
)
# Calls that set global state; `torch.set_*` and assignments are caught by pattern. Own generators and contexts do not.
GLOBAL_SETTERS = {
    "torch.manual_seed",
    "torch.seed",
    "torch.random.manual_seed",
    "torch.use_deterministic_algorithms",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.cuda.set_device",
    "np.random.seed",
    "random.seed",
    "os.putenv",
    "os.environ.update",
    "os.environ.setdefault",
}
PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def layer(name: str) -> int | None:
    """The layer of a module or of a name in it (config.RunConfig); None where its top-level module has none."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((i for prefix in prefixes for i, names in enumerate(LAYERS) if prefix in names), None)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions and type-checking blocks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`torch.backends.cudnn.benchmark` as written; "" for anything but a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Subscript):
        return dotted(node.value)
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def wrong_imports(module: str, tree: ast.AST) -> Iterator[str]:
    """Imports that do not go from right to left."""
    own, package = layer(module), module.partition(".")[0]
    if own is None:
        yield f"fastres.{module} is in no layer: give it a place in LAYERS of tests/test_architecture.py"
        return
    for line, name in imports(tree):
        if name.startswith("."):
            yield f"{module}:{line}: relative import; write it out from fastres"
        if not name.startswith("fastres.") or name.startswith("fastres.__"):
            continue
        target = name.removeprefix("fastres.")
        other, inside = layer(target), target.partition(".")[0] == package
        if other is None:
            yield f"{module}:{line}: {name} is in no layer: give it a place in LAYERS of tests/test_architecture.py"
        elif other > own or (other == own and not inside):
            yield f"{module}:{line}: imports {name}, which does not stand to its left in LAYERS"


def foreign_imports(module: str, tree: ast.AST) -> Iterator[str]:
    """DALI outside its one file, and pickle outside the reader of CIFAR's pickled batches."""
    for line, name in imports(tree):
        if name.startswith("nvidia.dali") and module != "data.dali":
            yield f"{module}:{line}: only data/dali.py imports nvidia.dali"
        if name.partition(".")[0] in PICKLES and not module.startswith("data.cifar"):
            yield f"{module}:{line}: {name} runs what it reads; only data/cifar*.py may, behind its checks"


def global_state(module: str, tree: ast.AST) -> Iterator[str]:
    """Global settings of torch, numpy or the process, made outside runtime.py."""
    if module == "runtime":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
            for name in map(dotted, targets):
                if name.startswith("torch.") or name == "os.environ":
                    yield f"{module}:{node.lineno}: sets {name}; only runtime.py sets global state"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name.startswith("torch.set_") or name.replace("numpy.", "np.") in GLOBAL_SETTERS:
                yield f"{module}:{node.lineno}: calls {name}; only runtime.py sets global state"


def unsafe_loads(module: str, tree: ast.AST) -> Iterator[str]:
    """`torch.load` without weights_only=True, `np.load` with allow_pickle."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if dotted(node.func) == "torch.load" and given.get("weights_only") is not True:
            yield f"{module}:{node.lineno}: torch.load without weights_only=True"
        if "allow_pickle" in {k.arg for k in node.keywords} and given.get("allow_pickle") is not False:
            yield f"{module}:{node.lineno}: allow_pickle"


CHECKS = (wrong_imports, foreign_imports, global_state, unsafe_loads)


def module_name(path: Path) -> str:
    """data/plan.py -> data.plan, data/__init__.py -> data.__init__."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules() -> list[Path]:
    # the package's own __init__.py is its shop window: it names modules of every layer, and imports none of them
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_module_keeps_the_rules(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert [complaint for check in CHECKS for complaint in check(module_name(path), tree)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "from fastres.runtime import prepare"),
        ("config", "def f():\n    import fastres.loop"),
        ("optim", "from fastres import models"),
        ("models.cifar", "from fastres.data.plan import EpochPlan"),
        ("models.depth", "from fastres.models.cifar import ResNet"),
        ("step", "from fastres.loop import train"),
        ("loop", "from .step import TrainStep"),
        ("novel", "x = 1"),
        ("cli", "from fastres.novel import x"),
        ("data.resident", "import nvidia.dali.fn as fn"),
        ("data.resident", "from nvidia import dali"),
        ("weights", "import pickle"),
        ("weights", "state = torch.load(path)"),
        ("weights", "state = torch.load(path, weights_only=False)"),
        ("weights", "np.load(path, allow_pickle=True)"),
        ("loop", "torch.manual_seed(0)"),
        ("loop", "torch.set_num_threads(1)"),
        ("loop", "torch.backends.cudnn.benchmark = True"),
        ("loop", "numpy.random.seed(0)"),
        ("cli", "os.environ['X'] = '1'"),
    ],
)
def test_rules_see_a_breach(module: str, source: str) -> None:
    assert [complaint for check in CHECKS for complaint in check(module, ast.parse(source))]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("step", "from fastres import optim\nfrom fastres.config import RunConfig\nimport torch"),
        ("data.resident", "from fastres.data.plan import EpochPlan\nfrom fastres.errors import InputError"),
        ("config", "from fastres.models.depth import check_depth"),
        ("data.dali", "from nvidia.dali import fn"),
        ("data.cifar", "import pickle"),
        ("runtime", "torch.set_num_threads(2)\ntorch.backends.cudnn.benchmark = True"),
        ("loop", "torch.Generator().manual_seed(0)\nx = os.environ['X']\nself.torch = 1"),
        ("weights", "torch.load(path, weights_only=True)"),
    ],
)
def test_rules_let_the_rest_pass(module: str, source: str) -> None:
    assert [complaint for check in CHECKS for complaint in check(module, ast.parse(source))] == []


def test_files_can_be_read_in_one_sitting() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("module", ["fastres", "fastres.config", "fastres.cli"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(*({{'torch', 'numpy', 'nvidia', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")
