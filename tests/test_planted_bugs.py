"""planted_bugs.py is run by hand; this checks that its bugs can still be planted."""

import os

import planted_bugs
import pytest

KERNELS = os.path.join(planted_bugs.ROOT, "fastattn", "kernels")


@pytest.mark.parametrize("bug", planted_bugs.BUGS, ids=lambda bug: bug.name)
def test_there_is_one_line_to_plant_it_in(bug):
    with open(os.path.join(KERNELS, bug.file)) as file:
        assert file.read().count(bug.right) == 1, f"{bug.right} is not in {bug.file}: mend tests/planted_bugs.py"


def test_no_such_line_is_an_error_that_names_the_bug():
    with pytest.raises(SystemExit, match=r"'a bug' no longer applies: contract\.h has 0 places"):
        planted_bugs.replaced(os.path.join(KERNELS, "contract.h"), "no such line", "", "a bug")


@pytest.mark.parametrize(
    ("returncode", "output", "found"),
    [
        (1, "...\nFAILED tests/test_x.py::test_y[1] - assert 1 == 2\n1 failed in 1 s", True),
        (1, "baseline: 35 calls\n    prefill: kernels 100 -> 120 (+20.0%)\nIf this is meant", True),
        (0, "5 passed in 1 s", False),
        (1, "5 passed", False),
        (2, "ERROR tests/test_x.py - ImportError", False),
        (-11, "", False),
        (1, "no valgrind here", False),
    ],
)
def test_only_a_failed_test_finds_a_bug(returncode, output, found):
    """Or a count of instructions. Not an error of collection, a crash of pytest itself, or a passing run."""
    assert planted_bugs.verdict(returncode, output)[0] is found
