"""Link against an older glibc than the machine's: prints the linker flags that make it so.

    LDFLAGS="$(python .ci/old_glibc.py 2.28 FOLDER)" python -m build --wheel

A glibc keeps old versions of each symbol for old programs, but links new ones against the newest: pthread_create@GLIBC_2.34,
which no older system has. For every symbol of libc and libm whose newest version is too new, FOLDER gets a stub of the
library that had it, which exports the newest version that is old enough; linkers take a symbol from the first library
that has it. Objects are those of any build. Symbols that have no such version are not in a stub, and `auditwheel` then
says that they are too new.

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


def exported(library):
    """{symbol: [(version, is the default)]} of a shared library."""
    path = subprocess.run(["cc", f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout.strip()
    table = subprocess.run(["readelf", "--wide", "--dyn-syms", path], capture_output=True, text=True, check=True).stdout
    symbols = defaultdict(list)
    for name, default, version in re.findall(r" FUNC .* (\w+)@(@?)GLIBC_([\d.]+)$", table, re.MULTILINE):
        symbols[name].append((version, bool(default)))
    return symbols


def stubs(oldest):
    """{library: {version: [symbols]}}"""
    found = defaultdict(lambda: defaultdict(list))
    for library in ("libc.so.6", "libm.so.6"):
        for name, versions in exported(library).items():
            newest = [version for version, default in versions if default]
            usable = [version for version, _ in versions if number(version) <= number(oldest)]
            if newest and number(newest[0]) > number(oldest) and usable:
                home = next((moved for moved, names in MOVED if names.match(name)), library)
                found[home][max(usable, key=number)].append(name)
    return found


def main(oldest, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for library, versions in stubs(oldest).items():
        source, script, target = folder / f"{library}.c", folder / f"{library}.map", folder / library
        names = [name for names in versions.values() for name in names]
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
        script.write_text("".join(f"GLIBC_{v} {{ global: {'; '.join(n)}; }};\n" for v, n in versions.items()))
        command = ["cc", "-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-w", f"-Wl,-soname,{library}"]
        subprocess.run([*command, f"-Wl,--version-script={script}", source, "-o", target], check=True)
        made.append(str(target))
    print("-Wl,--push-state,--no-as-needed", *made, "-Wl,--pop-state")


if __name__ == "__main__":
    main(*sys.argv[1:])
