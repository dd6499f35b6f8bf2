"""What setup.py asks and knows, without a build."""

import ast
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastattn"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="only a source distribution or a clone has it")


def names_of(*wanted):
    """Functions and constants of setup.py by name; it cannot be imported without building."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    parts = [
        part
        for part in tree.body
        if (isinstance(part, ast.FunctionDef) and part.name in wanted)
        or (isinstance(part, ast.Assign) and getattr(part.targets[0], "id", None) in wanted)
    ]
    names = {"os": os, "shutil": shutil, "subprocess": subprocess, "sysconfig": sysconfig, "tempfile": tempfile}
    exec(compile(ast.Module(parts, []), "setup.py", "exec"), names)
    return [names[name] for name in wanted]


def test_a_compiler_that_is_not_there(monkeypatch, tmp_path):
    """As on Windows, where none is called cc: that is an answer, and no error."""
    (compiles,) = names_of("compiles")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "cc")
    assert compiles("int main(void) { return 0; }") is False


def test_drivers_are_compiled_again_when_a_header_of_theirs_changes():
    kernels, *_, contract = names_of("KERNELS", "INTERFACE", "SHARED", "CONTRACT")
    known = {ROOT / path for path in contract}
    assert all(path.exists() for path in known)
    sources = [path for path in (ROOT / kernels).glob("*.c") if not re.search(r"_f\d\d$", path.stem)]
    folders = (ROOT / kernels, PACKAGE, PACKAGE / "include")
    for source in (*sources, *known, *PACKAGE.glob("*.py[xd]"), *PACKAGE.glob("*.pxd")):
        for name in re.findall(r'(?:#include|extern from) "([^"]+)"', source.read_text(encoding="utf-8")):
            places = {(folder / name).resolve() for folder in folders}
            assert places & known, f"{source.name} includes {name}, which setup.py does not name"
