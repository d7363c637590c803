"""The house in one order: a room imports from itself and from rooms above it, never in a circle.

Read from the source, by ast, so that imports inside functions and under TYPE_CHECKING count too.
"""

import ast
import configparser
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "srft_jax"
ROOMS = (
    "config batch mesh host ops models rewards objectives data rollout setup experience evaluation "
    "training report planning tasks"
).split()

# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "yaml": "pyyaml"}


def source_files():
    """Module name -> file, packages by their own name."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = source_files()


def imported_names(tree):
    """Everything that is imported, in full: `from a.b import c` gives a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name):
    """Our module that a name is, or is in: srft_jax.batch.Rows -> srft_jax.batch."""
    while name not in FILES:
        name = name.rpartition(".")[0]
    return name


def imports_of(module):
    return set(imported_names(ast.parse(FILES[module].read_text())))


def own_imports(module):
    return {module_of(n) for n in imports_of(module) if n.split(".")[0] == PACKAGE}


def third_party_imports(module):
    """Top-level packages that are neither ours nor Python's."""
    return {name.split(".")[0] for name in imports_of(module)} - {PACKAGE} - sys.stdlib_module_names


def room_of(module):
    return module.split(".")[1]


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in FILES if module != PACKAGE} == set(ROOMS)


def test_rooms_import_only_from_above():
    upward = [
        f"{module} imports {other}"
        for module in FILES
        for other in own_imports(module) - {PACKAGE}
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    ]
    assert not upward


def test_only_verbs_see_a_whole_run():
    """What a function needs stands in its signature: rooms take parts of a setup, never all."""
    importers = {
        room_of(module)
        for module in FILES
        if any(room_of(other) == "setup" for other in own_imports(module) - {PACKAGE})
    }
    assert importers == {"setup", "tasks"}


def test_no_circles():
    """Among modules, the package's own included: a circle within a room counts."""
    graph = {module: own_imports(module) - {module} for module in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_nobody_imports_the_corridor():
    assert not [module for module in FILES if "run" in third_party_imports(module)]
    run = set(imported_names(ast.parse((ROOT / "run.py").read_text())))
    own = {module_of(name) for name in run if name.startswith(PACKAGE)}
    assert {room_of(module) for module in own} == {"config", "host", "tasks"}


@pytest.mark.parametrize("package", ["jsonargparse", "yaml"])
def test_only_config_reads_flags_and_yaml(package):
    readers = {module for module in FILES if package in third_party_imports(module)}
    assert {room_of(module) for module in readers} == {"config"}


def test_nobody_imports_torch():
    assert not [module for module in FILES if "torch" in third_party_imports(module)]


def test_rewards_load_without_jax():
    modules = [module for module in FILES if room_of(module + ".") == "rewards"]
    assert len(modules) > 4
    check = f"import sys, {', '.join(modules)}; print('jax' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout.split(), run.stderr) == (["False", "False"], "")


def requirements(*extras):
    """Lines of what is required always, or by extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    if not extras:
        return setup["options"]["install_requires"].split()
    return [line for extra in extras for line in setup["options.extras_require"][extra].split()]


def distributions(*extras):
    return {re.match(r"[\w-]+", line)[0] for line in requirements(*extras)}


def test_requirements_are_what_is_imported():
    """What comes along with a requirement, as numpy does with jax, is declared if imported."""
    imported = set().union(*(third_party_imports(module) for module in FILES))
    used = {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in imported}
    assert used - distributions("hub", "gym") == distributions()


def test_declared_versions_are_installed_here():
    """Otherwise the suite says nothing about what a user gets."""
    for line in requirements():
        name, least = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(?:>=([\d.]+))?.*", line).groups()
        installed = importlib.metadata.version(name)
        assert least is None or _numbers(installed) >= _numbers(least), f"{line}: {installed}"


def _numbers(version):
    return [int(part) for part in re.match(r"[\d.]+", version)[0].strip(".").split(".")]
