"""Link against an older glibc than the machine's: prints the linker flags that make it so.

    LDFLAGS="$(python .ci/old_glibc.py 2.28 FOLDER)" python -m build --wheel

A glibc keeps old versions of each symbol for old programs, but links new ones against the newest, which no older system
has: pthread_create@GLIBC_2.34. FOLDER gets stubs of libc and libm, and of the libraries that older systems have beside
them, which export of each symbol the newest version that is old enough. They stand first in the command, and a linker
takes no second library of the same name. Objects are those of any build. A symbol that has no such version gets none
and is refused by the check at the end, `python .ci/old_glibc.py --check MODULE ...`.

Assumes GCC (or clang) and binutils. The stubs are for the linker alone.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

# Where symbols were before glibc 2.34 moved them into libc.so.6.
MOVED = [("libpthread.so.0", re.compile(r"pthread_|sem_|__pthread_")), ("libdl.so.2", re.compile(r"dl[a-z]+$"))]


def number(version):
    return tuple(int(part) for part in version.split("."))


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def exported(library):
    """{symbol: [(version, is the default)]} of a shared library."""
    path = output("cc", f"-print-file-name={library}").strip()
    table = output("readelf", "--wide", "--dyn-syms", path)
    symbols = defaultdict(list)
    for name, default, version in re.findall(r"(?:FUNC|OBJECT) .* (\w+)@(@?)GLIBC_([\d.]+)$", table, re.MULTILINE):
        symbols[name].append((version, bool(default)))
    return symbols


def stubs(oldest):
    """{library: {version: [symbols]}}"""
    found = defaultdict(lambda: defaultdict(list))
    for library in ("libc.so.6", "libm.so.6"):
        for name, versions in exported(library).items():
            newest = [version for version, default in versions if default]
            usable = [version for version, _ in versions if number(version) <= number(oldest)]
            if newest and usable:
                moved = number(newest[0]) > number(oldest)
                home = next((old for old, names in MOVED if moved and names.match(name)), library)
                found[home][max(usable, key=number)].append(name)
    return found


def check(modules):
    """No symbol of the C library without a version: the loader would bind it to whichever is oldest."""
    known = {name for library in ("libc.so.6", "libm.so.6") for name in exported(library)}
    for module in modules:
        table = output("readelf", "--wide", "--dyn-syms", module)
        wild = set(re.findall(r" GLOBAL .* UND (\w+)$", table, re.MULTILINE)) & known
        if wild:
            sys.exit(f"{module}: no version of {', '.join(sorted(wild))} is old enough")


def main(oldest, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for library, versions in stubs(oldest).items():
        source, script, target = folder / f"{library}.s", folder / f"{library}.map", folder / library
        names = [name for names in versions.values() for name in names]
        source.write_text("".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in names))
        script.write_text("".join(f"GLIBC_{v} {{ global: {'; '.join(n)}; }};\n" for v, n in versions.items()))
        command = ["cc", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{library}"]
        subprocess.run([*command, f"-Wl,--version-script={script}", source, "-o", target], check=True)
        made.append(str(target))
    print("-Wl,--push-state,--no-as-needed", *made, "-Wl,--pop-state")


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(sys.argv[2:])
    else:
        main(*sys.argv[1:])
