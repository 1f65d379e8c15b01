"""_core.pyi says what the extension has; the operators are a rule of it, not a list."""

import ast
from pathlib import Path

import msa_cpp
from msa_cpp import _core
from msa_cpp._call import OPERATORS

STUB = ast.parse((Path(msa_cpp.__file__).parent / "_core.pyi").read_text())


def names(body):
    """Public names that statements of a stub define, and its version."""
    functions = (node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    values = (node.target.id for node in body if isinstance(node, ast.AnnAssign))
    return {name for name in (*functions, *values)
            if not name.startswith("_") or name == "__version__"}


def test_module():
    there = {name for name in dir(_core) if not name.startswith("_") or name == "__version__"}
    stub = names(STUB.body)
    assert stub <= there
    assert there - stub == set(OPERATORS)


def test_plan():
    (plan,) = (node for node in STUB.body if getattr(node, "name", "") == "Plan")
    assert names(plan.body) == {name for name in dir(_core.Plan) if not name.startswith("_")}
