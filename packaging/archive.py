"""Archives whose bytes depend on nothing but what is in them: no clock, no account, no order of folders."""

import gzip
import io
import os
import tarfile


class Tar:
    """A tar file in memory. Times are those of the commit, owners are root."""

    def __init__(self, time: int) -> None:
        self.time = time
        self.bytes = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.bytes, mode="w", format=tarfile.PAX_FORMAT)
        self.folders: set[str] = set()

    def _info(self, name: str, mode: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.mtime, info.mode = self.time, mode
        info.uname = info.gname = "root"
        return info

    def folder(self, name: str, mode: int = 0o755) -> None:
        """Adds a folder once, and those above it."""
        above = os.path.dirname(name)
        if above and above != ".":
            self.folder(above)
        if name in self.folders:
            return
        self.folders.add(name)
        info = self._info(name, mode)
        info.type = tarfile.DIRTYPE
        self.tar.addfile(info)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Adds a file, and the folders that it is in."""
        above = os.path.dirname(name)
        if above and above != ".":
            self.folder(above)
        info = self._info(name, mode)
        info.size = len(content)
        self.tar.addfile(info, io.BytesIO(content))

    def finished(self) -> bytes:
        self.tar.close()
        return self.bytes.getvalue()


def gzipped(content: bytes) -> bytes:
    """Without name and time, which gzip would put in front."""
    out = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=out, mode="wb", compresslevel=9, mtime=0) as compressor:
        compressor.write(content)
    return out.getvalue()


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def files_below(folder: str) -> list[str]:
    """Paths of all files below a folder, relative to it, in order."""
    found = []
    for above, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(above, name), folder) for name in names]
    return sorted(found)
