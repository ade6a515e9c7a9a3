"""The package: what it imports, and the choice of a backend."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from dmtjepa import kernels


def test_depends_on_torch_and_triton_alone():
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for name in names:
                root = name.split(".")[0]
                assert root in {"torch", "triton"} or root in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_backends_have_the_same_functions():
    assert kernels.backend("triton") is kernels
    assert kernels.backend("torch") is kernels.plain
    for name in kernels.plain.__all__:
        own, plain = getattr(kernels, name), getattr(kernels.plain, name)
        assert inspect.signature(own).parameters == inspect.signature(plain).parameters
    assert set(kernels.plain.__all__) == set(kernels.__all__) - {"backend", "plain"}


def test_unknown_backend():
    with pytest.raises(ValueError, match='kernels must be "triton" or "torch", got \'cuda\''):
        kernels.backend("cuda")


@pytest.mark.slow
def test_the_operators_are_registered_once():
    """A second copy of the modules would register the operators again and free those that are in use.

    transformers does import a package `kernels` if it finds one.
    """
    script = "import dmtjepa.kernels as operators, kernels; assert kernels is operators"
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True, timeout=600)
