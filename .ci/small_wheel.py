"""Pack a wheel as small as its format allows: python .ci/small_wheel.py WHEEL FOLDER

Each file is compressed by Zopfli, whose output any reader of zip files reads and which is 4 % smaller than zlib's
best. Names, contents, dates and modes stay as they are, so RECORD and its hashes do, too.
"""

import binascii
import sys
import zipfile
import zlib
from pathlib import Path

import zopfli.zlib


def deflated(data):
    """A bare deflate stream: without the two bytes before and the four behind it that are zlib's."""
    return zopfli.zlib.compress(data, numiterations=1)[2:-4]


def pack(wheel, target):
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in source.infolist():
            data = source.read(entry)
            stream = deflated(data)
            assert zlib.decompress(stream, -15) == data, entry.filename
            entry.compress_type = zipfile.ZIP_STORED if len(stream) >= len(data) else zipfile.ZIP_DEFLATED
            write(packed, entry, data if entry.compress_type == zipfile.ZIP_STORED else stream, data)
    with zipfile.ZipFile(target) as packed, zipfile.ZipFile(wheel) as source:
        assert packed.testzip() is None
        assert packed.namelist() == source.namelist()


def write(packed, entry, stream, data):
    """Add a stream that is compressed already, which zipfile has no function for."""
    entry.CRC, entry.file_size, entry.compress_size = binascii.crc32(data), len(data), len(stream)
    entry.header_offset, entry.flag_bits, entry.extra = packed.fp.tell(), entry.flag_bits & 0x800, b""
    packed.fp.write(entry.FileHeader(zip64=False))
    packed.fp.write(stream)
    packed.filelist.append(entry)
    packed.NameToInfo[entry.filename] = entry
    packed.start_dir = packed.fp.tell()
    packed._didModify = True


def main(wheel, folder):
    wheel, folder = Path(wheel), Path(folder)
    target = folder / wheel.name
    pack(wheel, target)
    print(f"{wheel.name}: {wheel.stat().st_size} bytes, packed anew {target.stat().st_size}")


if __name__ == "__main__":
    main(*sys.argv[1:])
