"""The rooms and who may know whom: imports go down only."""

import ast
import importlib
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = Path(__file__).parents[2] / "s2ft_ray"
LEVELS = [
    {"errors"},
    {"config"},
    {"method", "data", "bases", "database"},
    {"registry", "accounts"},
    {"training", "scheduler", "serving"},
    {"node", "finetune", "cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# What only some rooms may import from outside, by its first name.
OWNERS = {
    "mlflow": {"registry"},
    "alembic": {"database"},
    "ray": {"training", "scheduler", "serving", "node", "finetune", "cli"},
    "torch": {"method", "data", "bases", "registry", "training", "serving"},
    "transformers": {"data", "bases", "registry", "training", "serving"},
}
# Peers of one level that may be asked all the same, and why.
ALLOWED_PEERS = {("cli", "node"), ("cli", "finetune")}
# What torch brings along, but not its build for CPUs; imported where there is a GPU alone.
ON_A_GPU = {"triton"}


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) != "__init__")


def test_every_room_has_a_level() -> None:
    assert {room_of(path) for path in FILES} <= set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    for name in imported_names(path):
        first, *rest = name.split(".")
        if first == "s2ft_ray":
            other = rest[0] if rest else room
            if other in LEVEL and other != room and (room, other) not in ALLOWED_PEERS:
                assert LEVEL[other] < LEVEL[room], f"{room} imports {other}"
        else:
            assert room in OWNERS.get(first, {room}), f"{room} imports {first}"


def required_by(requirement: Requirement) -> set[str]:
    """Return what a distribution asks for itself, with the extras that `requirement` names."""
    found = set()
    for text in metadata.requires(requirement.name) or ():
        other = Requirement(text)
        extras = requirement.extras or {""}
        if other.marker is None or any(other.marker.evaluate({"extra": it}) for it in extras):
            found.add(canonicalize_name(other.name))
    return found


def test_what_the_package_imports_is_among_its_requirements() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    declared = [Requirement(text) for text in project["project"]["dependencies"]]
    there = {canonicalize_name(it.name) for it in declared}.union(*map(required_by, declared))
    outside = {name.partition(".")[0] for path in FILES for name in imported_names(path)}
    outside -= sys.stdlib_module_names | {"s2ft_ray"} | ON_A_GPU
    distributions = metadata.packages_distributions()
    for name in sorted(outside):
        homes = {canonicalize_name(it) for it in distributions[name]}
        assert homes & there, f"{name} comes with none of the package's requirements"


def test_method_needs_torch_and_safetensors_alone() -> None:
    outside = {
        name.split(".")[0]
        for path in FILES
        if room_of(path) == "method"
        for name in imported_names(path)
    }
    allowed = {"torch", "safetensors", "s2ft_ray"}
    assert outside - allowed <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("s2ft_ray.method", ("ray", "mlflow", "transformers", "datasets")),
        ("s2ft_ray.config", ("torch", "ray", "mlflow", "transformers", "datasets")),
        ("s2ft_ray", ("torch", "ray", "mlflow", "transformers", "datasets")),
        ("s2ft_ray.bases", ("torch", "ray", "mlflow", "transformers", "datasets")),
        ("s2ft_ray.registry", ("torch", "ray", "mlflow", "transformers", "datasets")),
        ("s2ft_ray.serving.watcher", ("torch", "transformers", "datasets")),
        ("s2ft_ray.serving.deployment", ("torch", "mlflow", "transformers", "datasets")),
        ("s2ft_ray.cli", ("torch", "ray", "mlflow", "transformers", "datasets")),
    ],
)
def test_module_imports_without_the_packages_above_it(module: str, absent: tuple[str, ...]) -> None:
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"  # None: import raises
        f"import {module}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ["s2ft_ray", "s2ft_ray.bases", "s2ft_ray.registry"])
def test_every_name_that_a_room_gives_is_there(room: str) -> None:
    module = importlib.import_module(room)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018 - the attribute is what is asked for
