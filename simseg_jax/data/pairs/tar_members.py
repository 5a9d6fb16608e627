"""The members of tar files, also of damaged ones: where they are, and their contents.

A tar file is a sequence of members, each a header of 512 bytes and its content, padded to full
blocks. Two blocks of zeros end it. Real shards may also be cut off, damaged in the middle, or
several archives in one file. Nothing is unpacked, so a member may have any name: "/a", "../a".
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from simseg_jax.data.pairs.example import Problems
from simseg_jax.runtime import remote

HEADER = tarfile.BLOCKSIZE  # Bytes of a header, which directly precedes the content.
MAGIC = 257  # Offset of the magic "ustar" in a header.
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
TRIES = 10_000  # After so many false headers a search ends.
DAMAGES = 20  # After so many damaged places the rest of a file is left out.
GAP = 1 << 16  # Members that are at most so many bytes apart are read together.


def find_members(file: BinaryIO, path: str, problems: Problems) -> Iterator[tuple]:
    """(number of the archive, `TarInfo`) of every member of a file with one or more archives.

    Names are unique within an archive only. Damage is counted, and the search continues at the next
    header.
    """
    start, archive, damages, end = 0, 0, 0, file.seek(0, 2)
    while start < end and damages < DAMAGES:
        # `start` is the end of the last good member; the search for a header begins at `resume`.
        resume = start + HEADER
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # tarfile would keep all members in memory.
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    if member.size < 0 or tar.offset <= start:  # It would loop forever.
                        break
                    if member.offset_data + member.size > end:
                        resume = member.offset_data
                        break
                    start = tar.offset
                    resume = start + HEADER
                    yield archive, member
        # tarfile raises errors of many kinds for hostile headers.
        except Exception as error:
            if not remote.is_damage(error):
                raise
        # Here tarfile found the end of an archive, a block of zeros, or something it cannot read.
        file.seek(start)
        block = file.read(HEADER)
        ended = block == bytes(HEADER)
        following, clean = _next_header(file, resume, end)
        if not (ended and clean):
            packed = " (it is compressed: decompress it)" if block.startswith(COMPRESSED) else ""
            problems.add(f"{path}: damaged at byte {start} of {end}{packed}")
            damages += 1
        start, archive = following, archive + ended
    if start < end:
        problems.add(f"{path}: too much damage, left out from byte {start} on")


def _next_header(file: BinaryIO, start: int, end: int) -> tuple[int, bool]:
    """(offset of the next header from `start` on, else `end`; whether only zeros precede it).

    A header is found by its magic and confirmed by its checksum, as contents may have the magic.
    """
    clean, tries = True, 0
    while start < end and tries < TRIES:
        file.seek(start)
        chunk = file.read(GAP + HEADER)  # Chunks overlap: a header may lie across their border.
        place = -1
        while (place := chunk.find(b"ustar", place + 1)) >= 0 and tries < TRIES:
            first = place - MAGIC
            try:
                tarfile.TarInfo.frombuf(chunk[max(first, 0) : first + HEADER], "utf-8", "replace")
                return start + first, clean and not chunk[:first].strip(b"\0")
            except (tarfile.HeaderError, ValueError):
                tries += 1
        clean = clean and not chunk[:GAP].strip(b"\0")
        start += GAP
    return end, clean and tries < TRIES


def read_members(path: str, spans: list[tuple[int, int]]) -> list[tuple[str, bytes]]:
    """(name, content) of members, in one read if they are close together.

    spans: (offset, size) of each content. A ValueError says that a header has another size.
    """
    start = min(offset for offset, _ in spans) - HEADER
    length = max(offset + size for offset, size in spans) - start
    if length > sum(size + HEADER for _, size in spans) + GAP:
        return [member for span in spans for member in read_members(path, [span])]
    block = remote.read(path, start, length)
    members = []
    for offset, size in spans:
        begin = offset - start
        header = tarfile.TarInfo.frombuf(block[begin - HEADER : begin], "utf-8", "replace")
        if header.size != size:
            raise ValueError("the archive has changed since it was indexed")
        members.append((header.name, block[begin : begin + size]))
    return members
