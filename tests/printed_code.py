"""The Python that README and pages print, as modules for type checkers: `python tests/printed_code.py FOLDER`."""

import ast
import builtins
import re
import sys
from pathlib import Path
from textwrap import dedent, indent

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

BEFORE = """\
from typing import Any

import numpy as np
from numpy.typing import NDArray

import anynorm

Floats = NDArray[np.float64]

"""
GIVEN = {
    "Any": "dist mesh model state xp",
    "Floats": "x z gamma beta dy w b w1 b1 h v ones past signal result",
    "list[Floats]": "batches pieces shards",
    "NDArray[np.int64]": "lengths",
    "NDArray[np.bool_]": "mask",
    "int": "n number",
    "anynorm.Moments[Floats]": "measured simulated",
    "anynorm.NormParams[Floats]": "params",
    "anynorm.RunningStats[Floats]": "running",
    "anynorm.WeightNorm[Floats]": "weight",
}
"""What a block takes for given, by its type; a name that is not here is an error."""
ABSENT = re.compile(r"\b(torch|dist|jax|cupy|flax|ndonnx|onnxruntime)\b")
"""Libraries that a type checker finds nothing of: what a block of theirs takes for given is Any."""
TYPES = {name: kind for kind, names in GIVEN.items() for name in names.split()}


def blocks(page: str) -> list[str]:
    """The code of each block of Python, without prompts and what is printed."""
    found = []
    for _, kind, text in re.findall(r"^( *)```(python|pycon)\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL):
        lines = dedent(text).splitlines()
        if kind == "pycon":
            lines = [line[4:] for line in lines if line.startswith((">>>", "..."))]
        found.append("\n".join(lines))
    assert len(found) == page.count("```py"), "a block that was not understood"
    return found


def free(code: str) -> list[str]:
    """The names that are read before the block makes them."""
    bound, found = set(dir(builtins)) | {"anynorm", "np"}, {}
    for statement in ast.parse(code).body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        inner = {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
        changed = statement.target if isinstance(statement, ast.AugAssign) else None
        made = {name.id for name in names if isinstance(name.ctx, ast.Store) and name is not changed}
        if isinstance(statement, ast.Assign):
            targets = {name.id for each in statement.targets for name in ast.walk(each) if isinstance(name, ast.Name)}
            inner |= made - targets
        else:
            inner |= made
        read = [name.id for name in names if isinstance(name.ctx, ast.Load) or name is changed]
        found |= dict.fromkeys(name for name in read if name not in bound | inner)
        bound |= made
        if isinstance(statement, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            bound.add(statement.name)
    return list(found)


def module(page: str) -> str:
    """A function for each block; what it takes for given are its arguments."""
    functions = []
    for number, code in enumerate(blocks(page), start=1):
        foreign = ABSENT.search(code)
        arguments = ", ".join(f"{name}: {'Any' if foreign else TYPES[name]}" for name in free(code))
        functions.append(f"\ndef block_{number}({arguments}) -> None:\n{indent(code, '    ')}\n")
    return BEFORE + "\n".join(functions) if functions else ""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for path in PAGES:
        if text := module(path.read_text()):
            (folder / f"{path.stem.lower()}_page.py").write_text(text)
