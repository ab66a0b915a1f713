"""The import arrows of the design, and a few other rules that only a reader of all files can keep.

Read from the syntax tree, so an import inside a function counts as one at the top. A new
room needs a line in ``ARROWS``; a new exception to a rule needs a line here with its reason.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "lmcache_ext")
EVERYTHING = (*PACKAGES, "tests", "benchmarks", "examples", "scripts")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

# room -> rooms it may import. `config_values` and its like belong to the room `config`.
ARROWS = {
    "errors": set(),
    "config": {"errors"},
    "host_memory": {"config", "errors"},
    "reload": {"config", "errors"},
    "namespace": {"config", "errors"},
    "frame": {"config", "errors"},
    "wire": {"frame", "errors"},
    "ops": {"namespace", "frame", "config", "errors"},
    "serde": {"ops", "namespace", "frame", "config", "errors"},
    "stores": {"wire", "namespace", "frame", "config", "errors"},
    "daemons": {"stores", "wire", "namespace", "frame", "config", "errors"},
    "offload": {"stores", "serde", "ops", "wire", "namespace", "frame", "host_memory", "reload", "config", "errors"},
    "connector": {"offload", "reload", "namespace", "frame", "config", "errors"},
    "plugin": {"offload", "config", "errors"},
    "exposition": set(),
    "manifests": {"exposition", "config", "errors"},
    "doctor": {"exposition", "stores", "config", "errors"},  # asks backends as a server would, through their stores
    "cli": {
        "doctor",
        "manifests",
        "daemons",
        "stores",
        "wire",
        "namespace",
        "frame",
        "host_memory",
        "config",
        "errors",
    },
}
RUNTIME_MAY_IMPORT = {"config", "host_memory", "reload", "plugin", "errors"}

# module -> rooms (or packages) that alone may import it
ONLY_IN = {
    "vllm": {"connector", "plugin", "offload", "runtime"},
    "torch": {"connector", "offload", "serde", "ops", "runtime"},
    "kserve": {"runtime"},
    "ctypes": {"ops"},
    "cffi": {"ops"},
    "asyncio": {"daemons", "runtime"},
    "redis": {"stores"},
    "valkey": {"stores"},
    "kubernetes": {"manifests"},
    "mooncake": {"stores"},
    "infinistore": {"stores"},
}
WITHOUT_TORCH = ("config", "errors", "namespace", "frame", "wire", "stores", "daemons", "manifests", "doctor")

RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}

# Where a thread, a process or somebody else's call begins: a failure is judged there.
MAY_CATCH_EVERYTHING = {
    "lmcache_ext/connector.py": "every hook vLLM calls: the cache may fail, the engine may not",
    "lmcache_ext/reload.py": "top of the watching thread",
    "lmcache_ext/offload/hooks.py": "around every hook vLLM calls, on behalf of the connector",
    "lmcache_ext/offload/copier.py": "top of the copying thread",
    "lmcache_ext/offload/lookups.py": "top of the lookups' thread: nobody else answers those who wait",
    "lmcache_ext/offload/tier.py": "top of each tier job: one that never reports pins its rows",
    "lmcache_ext/stores/infinistore.py": "InfiniStore's client raises bare Exception for whatever fails",
    "lmcache_ext/stores/jobs.py": "top of the pool's threads",
    "lmcache_ext/stores/guard.py": "top of the probing thread",
    "runtime/__main__.py": "top of the process",
    "runtime/server.py": "top of the server",
}

READS = {"os.environ", "os.environb", "os.getenv", "os.getenvb"}

MAY_READ_ENVIRONMENT = {
    "lmcache_ext/cli.py": "hands the environment, or an empty one, to config.load_config",
    "lmcache_ext/stores/infinistore_store.py": "puts back what importing InfiniStore's client changes in it",
    "lmcache_ext/plugin.py": "LMCACHE_EXT_ENABLE says whether this package takes part at all, before any Config",
    "runtime/args.py": "the server's own settings",
}


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    path: str  # from the root, with slashes
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        return tuple(ast.walk(self.tree))

    @property
    def module(self) -> str:
        parts = Path(self.path).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        return room_of(self.module)

    def imports(self) -> Iterator[tuple[int, str]]:
        """Yield (line, absolute dotted name) of each import; `from a import b` gives `a.b`."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.module.split(".")
        is_package = self.path.endswith("__init__.py")
        package = parts[: len(parts) - node.level + is_package]
        return ".".join([*package, *([node.module] if node.module else [])])


def room_of(module: str) -> str:
    """`lmcache_ext.stores.disk` -> `stores`; `lmcache_ext.config_values` -> `config`; `runtime.args` -> `runtime`."""
    parts = module.split(".")
    if parts[0] != "lmcache_ext" or len(parts) == 1:
        return parts[0]
    return "config" if parts[1].startswith("config_") else parts[1]


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    return tuple(parsed(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))


@cache
def parsed(file: Path) -> Source:
    path, text = file.relative_to(ROOT).as_posix(), file.read_text()
    return Source(path, text, ast.parse(text, path))


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """A million nodes that every later garbage collection would look at."""
    yield
    sources.cache_clear()
    parsed.cache_clear()


def test_there_is_something_to_read():
    assert {source.module for source in sources(*PACKAGES)} >= {"lmcache_ext.errors", "lmcache_ext.ops.pages"}


def test_imports_follow_the_arrows():
    wrong = []
    for source in sources("lmcache_ext"):
        if source.room == "lmcache_ext":  # __init__.py: the version, no imports of ours
            allowed = set()
        else:
            assert source.room in ARROWS, f"{source.path}: no arrow is drawn for the room {source.room}"
            allowed = ARROWS[source.room] | {source.room}
        for line, name in source.imports():
            if name.startswith("runtime.") or name == "runtime":
                wrong.append(f"{source.path}:{line} imports {name}: lmcache_ext knows nothing of KServe")
            elif name.startswith("lmcache_ext.") and room_of(name) not in allowed | {"__version__"}:
                wrong.append(f"{source.path}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_server_knows_the_cache_by_its_configuration_only():
    wrong = [
        f"{source.path}:{line} imports {name}"
        for source in sources("runtime")
        for line, name in source.imports()
        if name.split(".")[0] == "lmcache_ext" and room_of(name) not in RUNTIME_MAY_IMPORT | {"__version__"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ONLY_IN)
def test_module_is_imported_only_where_it_belongs(module):
    wrong = [
        f"{source.path}:{line} imports {name}; only {sorted(ONLY_IN[module])} may"
        for source in sources(*PACKAGES)
        for line, name in source.imports()
        if name.split(".")[0] == module and source.room not in ONLY_IN[module]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("client", ["redis", "valkey", "mooncake", "infinistore"])
def test_a_client_library_is_imported_at_the_top_of_its_store(client):
    for source in sources("lmcache_ext/stores"):
        top = {id(node) for node in source.tree.body}
        for node in source.nodes:
            if isinstance(node, ast.Import | ast.ImportFrom) and client in imported_packages(node):
                assert Path(source.path).stem.startswith(client), f"{source.path}:{node.lineno} imports {client}"
                assert id(node) in top, f"{source.path}:{node.lineno} imports {client} inside a function"


def imported_packages(node: ast.Import | ast.ImportFrom) -> set[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names if not getattr(node, "level", 0)}


def test_no_import_cycles():
    modules = {source.module for source in sources(*PACKAGES)}
    graph = {
        source.module: {nearest(name, modules) for _, name in source.imports()} - {None, source.module}
        for source in sources(*PACKAGES)
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def nearest(name: str, modules: set[str]) -> str | None:
    """`from a import b` may name the module `a.b` or the attribute `b` of `a`."""
    return name if name in modules else next((m for m in (name.rpartition(".")[0],) if m in modules), None)


def modules_without_torch() -> list[str]:
    # __main__ modules act when imported, and stores may need a client that is not installed
    found = [source for source in sources("lmcache_ext") if source.room in WITHOUT_TORCH]
    optional = {
        f"lmcache_ext.stores.{name}" for name in ("redis", "valkey", "mooncake", "mooncake_probe", "infinistore")
    }
    return [source.module for source in found if source.module not in optional]


def test_rooms_without_torch_stay_without_it_at_run_time():
    code = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    heavy = sorted({'torch', 'vllm', 'kserve', 'transformers'} & set(sys.modules))\n"
        "    if heavy: sys.exit(f'{module} imports {heavy}')\n"
    )
    command = [sys.executable, "-c", code, *modules_without_torch()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_nothing_can_be_unpickled():
    wrong = [
        f"{source.path}:{line} imports {name}"
        for source in sources(*EVERYTHING)
        for line, name in source.imports()
        if name.split(".")[0] in RUNS_CODE
    ]
    assert not wrong, "\n".join(wrong)


def test_everything_is_caught_only_at_the_top_of_a_thread_or_process():
    wrong = [
        f"{source.path}:{node.lineno} catches everything"
        for source in sources(*PACKAGES)
        if source.path not in MAY_CATCH_EVERYTHING
        for node in source.nodes
        if isinstance(node, ast.ExceptHandler) and catches_everything(node)
    ]
    assert not wrong, "\n".join(wrong)


def catches_everything(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:  # cleans up and passes it on
        return False
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(name, ast.Name) and name.id in {"Exception", "BaseException"} for name in caught)


def test_the_environment_is_read_in_one_place_of_each_package():
    wrong = [
        f"{source.path}:{line} reads the environment"
        for source in sources(*PACKAGES)
        if source.room != "config" and source.path not in MAY_READ_ENVIRONMENT
        for line in environment_reads(source.nodes)
    ]
    assert not wrong, "\n".join(wrong)


def environment_reads(nodes: Sequence[ast.AST]) -> Iterator[int]:
    """Yield lines with `os.environ` or `os.getenv`, but not `os.environ[...] = ...` and its kin."""
    writes = {id(node) for statement in nodes for node in written_by(statement)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if f"os.{alias.name}" in READS)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in READS and id(node) not in writes:
            yield node.lineno


def written_by(node: ast.AST) -> Iterator[ast.expr]:
    """Yield `os.environ` of `os.environ[k] = v`, `del os.environ[k]`, `.update(...)` and `.setdefault(...)`."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        yield node.value
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"update", "setdefault"}
    ):
        yield node.func.value


def test_files_fit():
    wrong = [
        f"{source.path}: {lines} lines, at most {MAX_FILE_LINES}"
        for source in sources(*EVERYTHING)
        if (lines := len(source.text.splitlines())) > MAX_FILE_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_functions_fit_a_screen():
    wrong = [
        f"{source.path}:{node.lineno} {node.name}: {lines} lines, at most {MAX_FUNCTION_LINES}"
        for source in sources(*EVERYTHING)
        for node in source.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not wrong, "\n".join(wrong)
