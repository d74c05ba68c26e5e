"""The disks that a power loss could leave behind, made from a real trace of a process's writes and fsyncs.

The rules are those that a file system promises, and no more: what was written before an fsync of the file is there;
of what was written after it, each sector of 512 bytes may be old or new, in any order; a name is only sure to be there
(or gone) once its folder was fsynced.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512
CALLS = "openat,pwrite64,write,fsync,fdatasync,ftruncate,unlink,rename,close,sendto"
CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
HEX = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
IDENTIFIER = re.compile(rb"(?:^|&)identifier=([^&]+)")

Choose = Callable[[], bool]
"""Whether something that nobody had waited for reached the disk all the same."""


@dataclass
class Change:
    """Bytes written at ``offset``, or the file cut or grown to ``offset`` where ``data`` is None."""

    offset: int
    data: bytes | None
    safe: bool = False


@dataclass
class File:
    """One file, by whatever names it has."""

    changes: list[Change] = field(default_factory=list)


@dataclass
class Naming:
    """A name that was given to a file, or taken from it (None); ``instead_of`` is the name that it gave up for it."""

    name: str
    file: File | None
    safe: bool = False
    instead_of: str | None = None


@dataclass
class Disk:
    """A folder as its writer sees it, and what of it is safe."""

    folder: Path
    namings: list[Naming] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """Lines that the process had printed."""
    posted: list[str] = field(default_factory=list)
    """The identifiers of meter events that it had sent: Stripe has them."""
    _open: dict[int, File | str] = field(default_factory=dict)

    def file(self, name: str) -> File | None:
        """The file that has ``name`` now."""
        for one in reversed(self.namings):
            if name in (one.name, one.instead_of):
                return one.file if name == one.name else None
        return None

    def take(self, call: str, arguments: str, result: int) -> bool:
        """Follow one system call; True if the folder, or what is known of it, changed."""
        if result < 0:
            return False
        if call == "openat":
            return self._opened(arguments, result)
        if call == "unlink":
            return self._name(Path(_bytes(arguments).decode()), None)
        if call == "rename":
            old, new = (Path(bytes.fromhex(name.replace("\\x", "")).decode()) for name, _ in HEX.findall(arguments))
            return self._name(new, self.file(old.name), old)
        if call == "sendto":
            sent = IDENTIFIER.findall(_bytes(arguments))
            self.posted += [identifier.decode() for identifier in sent]
            return bool(sent)
        descriptor = int(arguments.partition(",")[0])
        if call == "write" and descriptor == 1:
            self.said += _bytes(arguments).decode().split()
            return True
        target = self._open.get(descriptor)
        if call == "close":
            self._open.pop(descriptor, None)
        elif call in ("fsync", "fdatasync") and isinstance(target, str):
            self._secure(self.namings)
            return True
        elif isinstance(target, File):
            self._changed(target, call, arguments)
            return True
        return False

    def _opened(self, arguments: str, descriptor: int) -> bool:
        path = Path(_bytes(arguments).decode())
        self._open.pop(descriptor, None)
        if path == self.folder:
            self._open[descriptor] = "folder"
        if path.parent != self.folder or path.name.endswith("-shm"):
            return False
        made = self.file(path.name) is None
        file = self.file(path.name) or File()
        self._open[descriptor] = file
        return made and self._name(path, file)

    def _name(self, path: Path, file: File | None, instead_of: Path | None = None) -> bool:
        if path.parent != self.folder or path.name.endswith("-shm"):
            return False
        self.namings.append(Naming(path.name, file, instead_of=instead_of.name if instead_of else None))
        return True

    def _changed(self, file: File, call: str, arguments: str) -> None:
        if call in ("fsync", "fdatasync"):
            self._secure(file.changes)
        elif call == "ftruncate":
            file.changes.append(Change(int(arguments.split(",")[1]), None))
        elif call == "pwrite64":
            file.changes.append(Change(int(arguments.rsplit(",", 1)[1]), _bytes(arguments)))
        elif call == "write":  # our own small files are written from their beginning to their end
            file.changes.append(Change(sum(len(one.data or b"") for one in file.changes), _bytes(arguments)))
        else:
            raise AssertionError(f"{call} on a file is not followed")

    @staticmethod
    def _secure(what: list[Change] | list[Naming]) -> None:
        for one in what:
            one.safe = True

    def image(self, choose: Choose) -> Mapping[str, bytes]:
        """What may be found when the power is back."""
        found: dict[str, File] = {}
        for naming in self.namings:
            if not naming.safe and not choose():
                continue
            found.pop(naming.name, None)
            found.pop(naming.instead_of or "", None)
            if naming.file is not None:
                found[naming.name] = naming.file
        return {name: _content(file, choose) for name, file in found.items()}


def _content(file: File, choose: Choose) -> bytes:
    content = bytearray()
    for change in file.changes:
        if change.data is None:
            if change.safe or choose():
                content[change.offset :] = b"\0" * max(change.offset - len(content), 0)
            continue
        for start, piece in _sectors(change):
            if change.safe or choose():
                content.extend(b"\0" * (start - len(content)))
                content[start : start + len(piece)] = piece
    return bytes(content)


def _sectors(change: Change) -> Iterator[tuple[int, bytes]]:
    assert change.data is not None
    start, end = change.offset, change.offset + len(change.data)
    while start < end:
        stop = min(end, (start // SECTOR + 1) * SECTOR)
        yield start, change.data[start - change.offset : stop - change.offset]
        start = stop


def _bytes(arguments: str) -> bytes:
    match = HEX.search(arguments)
    assert match is not None
    assert not match[2], "strace cut the data short"
    return bytes.fromhex(match[1].replace("\\x", ""))


def trace(program: str, folder: Path, *arguments: str, output: Path) -> list[str]:
    """Run a Python program under strace: the system calls that matter here, one a line."""
    options = ["-f", "-qq", "-xx", "-s", "10000000", "-e", f"trace={CALLS}", "-o", str(output)]
    command = ["strace", *options, sys.executable, "-W", "error", "-c", program, str(folder), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=100)
    lines = output.read_text().splitlines()
    assert not [line for line in lines if "unfinished" in line], "only one thread at a time can be followed"
    return lines


def moments(lines: list[str], folder: Path) -> Iterator[Disk]:
    """The disk after each call that changed it or what is safe on it; always the same one, further on."""
    disk = Disk(folder)
    for line in lines:
        match = CALL.match(line)
        if match and disk.take(match[1], match[2], int(match[3])):
            yield disk


def ways(chance: random.Random) -> Iterator[Choose]:
    """Nothing unsafe survived, everything did, and two ways between."""
    yield lambda: False
    yield lambda: True
    yield lambda: chance.random() < 0.5
    yield lambda: chance.random() < 0.9
