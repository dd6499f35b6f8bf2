"""benchmarks/instructions.py: its calls run and are those of the record, its files are read right, and what it says of
differences is so. It counts by itself where valgrind is installed, in .ci/run."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "instructions.py"
BUILD = {
    "machine": "x86_64",
    "compiler": "GCC: (Debian) 12.2.0",
    "flags": "",
    "cython": "3_1_0",
    "python": "3.11",
    "python_build": "3.11.7 (main, today)",
    "numpy": "2.4.6",
    "libc": "glibc 2.36",
    "valgrind": "valgrind-3.19.0",
}


@pytest.fixture(scope="module")
def instructions():
    spec = importlib.util.spec_from_file_location("instructions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_record_is_of_these_calls(instructions):
    names = []
    for name, call in instructions.calls():
        call()
        names.append(name)
    assert len(names) == len(set(names)) >= 30
    record = json.loads(instructions.RECORD.read_text())
    assert set(record) == {"made_with", *instructions.INSTRUCTION_SETS}
    assert set(record["made_with"]) == set(BUILD) == {need for needs in instructions.NEEDS.values() for need in needs}
    for instruction_set in instructions.INSTRUCTION_SETS:
        assert list(record[instruction_set]) == names
        for kernels, library, call in record[instruction_set].values():
            assert 0 < kernels <= library <= call


def test_instructions_are_those_of_a_function_itself(instructions, tmp_path):
    """A call's second line is what the callee took, which is counted where the callee stands."""
    dump = tmp_path / "callgrind.out.1.2"
    dump.write_text(
        "version: 1\npositions: line\nevents: Ir\ndesc: Trigger: Client Request: softmax, axis 0\n\n"
        f"ob=(1) {instructions.PACKAGE}/_runtime.so\nfl=(1) ???\nfn=(1) rows\n0 100\n"
        "cob=(2) /lib/libm.so\ncfn=(2) exp\n"
        "calls=3 0\n0 1000\n+1 5\nob=(2)\nfn=(2)\n0 1000\n"
        f"ob=(3) {instructions.PACKAGE}/_softmax.so\nfn=(3) run\n* 20\n"
        "ob=(1)\nfn=(4) columns\n0 1\ntotals: 1126\n"
    )
    assert instructions.read_dump(dump) == ("softmax, axis 0", [106, 126, 1126])


@pytest.mark.parametrize(
    ("change", "compared", "reason"),
    [
        ({}, ["kernels", "library", "call"], None),
        ({"numpy": "2.5.0"}, ["kernels", "library"], "numpy: 2.4.6 there, 2.5.0 here"),
        ({"python": "3.12"}, ["kernels"], "python: 3.11 there, 3.12 here"),
        ({"compiler": "clang version 14.0.6"}, [], "compiler: GCC: (Debian) 12.2.0 there, clang version 14.0.6 here"),
    ],
)
def test_another_build_is_compared_no_further_than_it_can_be(instructions, change, compared, reason):
    names, reasons = instructions.comparable(BUILD, {**BUILD, **change})
    assert (names, reasons) == (compared, [reason] if reason else [])


def test_differences_either_way(instructions):
    before = {"same": [1000, 2000, 9000], "slower": [1000, 2000, 9000], "faster": [1000, 2000, 9000], "gone": [1, 2, 3]}
    now = {"same": [1029, 2001, 9900], "slower": [1031, 2000, 9000], "faster": [1000, 1900, 9000], "new": [1, 2, 3]}
    wrong, largest = instructions.differences(before, now, ["kernels", "library"])
    assert wrong == [
        "slower: kernels 1000 -> 1031 (+3.1%)",
        "faster: library 2000 -> 1900 (-5.0%)",
        "gone: recorded, but not counted",
        "new: not recorded",
    ]
    assert largest == "same: kernels 1000 -> 1029 (+2.9%)"
