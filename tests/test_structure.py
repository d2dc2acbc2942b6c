"""The package's rooms: imports go one way, none goes round in a circle, and no file grows too long."""

import ast
from pathlib import Path

import pytest
from support.networks import CHECKOUT

# from top to bottom; a room imports from those below it and from itself
ROOMS = (
    "__main__ cli hear interop viewing learning corpus inference pretrained conversion audio network "
    "progress files errors version"
).split()
MOST_LINES = 400


def modules():
    """{name: path} of all modules, with `conversion` where it is installed."""
    found = {}
    for folder, prefix in ((CHECKOUT / "soundnet_port", ()), (CHECKOUT / "conversion", ("conversion",))):
        for path in folder.rglob("*.py"):
            parts = [*prefix, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(["soundnet_port", *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imports(name):
    """The project's modules that a module imports, at the top or anywhere inside, types too."""
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [target if target in MODULES else node.module for target in inner]
        else:
            continue
        yield from (target for target in targets if target in MODULES and target != name)


def room(name):
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"soundnet_port"}))
def test_imports_go_down(name):
    for target in imports(name):
        assert room(target) in ROOMS, f"{name} imports {target}, the list of public names"
        assert ROOMS.index(room(name)) <= ROOMS.index(room(target)), f"{name} imports {target}"


def test_no_imports_go_round_in_a_circle():
    graph = {name: set(imports(name)) for name in MODULES if name != "soundnet_port"}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in circles, or above them: {sorted(graph)}"


def test_network_imports_errors_and_files_alone():
    """So that a reader can lift the folder out."""
    names = {target for name in MODULES if room(name) == "network" for target in imports(name)}
    assert {room(target) for target in names} <= {"network", "errors", "files"}


def test_no_file_is_too_long():
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_every_room_is_packaged():
    from configparser import ConfigParser

    setup = ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    packages = set(setup["options"]["packages"].split())
    rooms = {
        f"soundnet_port.{path.parent.relative_to(CHECKOUT / 'soundnet_port').as_posix().replace('/', '.')}"
        for path in Path(CHECKOUT / "soundnet_port").glob("*/**/__init__.py")
    }
    assert packages == {*rooms, "soundnet_port", "soundnet_port.conversion", "soundnet_port.shipped"}
