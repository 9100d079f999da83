"""deb.py STAGE VERSION ARCHITECTURE TIME OUT: a Debian package of what build.sh has put into STAGE.

The program is linked statically, so the package depends on nothing. The format is that of deb(5): an ar archive of a version, a
control tarball and a data tarball.
"""

import gzip
import hashlib
import os
import sys

from archive import Tar, files_below, gzipped, read

# What a Debian system has where, by the folders of the stage.
COMPLETIONS = {
    "sluice.bash": "usr/share/bash-completion/completions/sluice",
    "_sluice": "usr/share/zsh/vendor-completions/_sluice",
    "sluice.fish": "usr/share/fish/vendor_completions.d/sluice.fish",
}
DOCUMENTS = ["README.md", "CHANGELOG.md"]


def place(path: str, content: bytes) -> tuple[str, bytes] | None:
    """Where a file of the stage is installed, and as what."""
    folder, name = os.path.split(path)
    if path == "sluice":
        return "usr/bin/sluice", content
    if folder == "man":
        return f"usr/share/man/man1/{name}.gz", gzip.compress(content, 9, mtime=0)
    if folder == "completions":
        return (COMPLETIONS[name], content) if name in COMPLETIONS else None
    if name == "LICENSE":
        return "usr/share/doc/sluice/copyright", content
    return (f"usr/share/doc/sluice/{name}", content) if name in DOCUMENTS or name.endswith(".cdx.json") else None


def control(version: str, architecture: str, kibibytes: int) -> bytes:
    return f"""Package: sluice
Version: {version}
Architecture: {architecture}
Maintainer: The Sluice authors <https://github.com/sluice-rs/sluice>
Installed-Size: {kibibytes}
Section: science
Priority: optional
Homepage: https://github.com/sluice-rs/sluice
Description: runs mixture-of-experts language models far larger than memory
 Sluice keeps what every token needs in memory, and reads the experts that
 the router picks from an SSD. One file per model, every byte of it checked;
 a command line, and a server with the APIs of OpenAI, Anthropic and Ollama.
""".encode()


def ar(members: list[tuple[str, bytes]], time: int) -> bytes:
    out = b"!<arch>\n"
    for name, content in members:
        out += f"{name:<16}{time:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    return out


def main() -> None:
    stage, version, architecture, time, out = sys.argv[1:]
    data, sums, size = Tar(int(time)), "", 0
    placed = filter(None, (place(path, read(os.path.join(stage, path))) for path in files_below(stage)))
    for path, content in sorted(placed):
        data.file(f"./{path}", content, 0o755 if path.startswith("usr/bin/") else 0o644)
        sums += f"{hashlib.md5(content).hexdigest()}  {path}\n"
        size += len(content)
    about = Tar(int(time))
    about.file("./control", control(version, architecture, -(-size // 1024)))
    about.file("./md5sums", sums.encode())
    members = [
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", gzipped(about.finished())),
        ("data.tar.gz", gzipped(data.finished())),
    ]
    with open(out, "wb") as file:
        file.write(ar(members, int(time)))


main()
