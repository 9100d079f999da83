"""tarball.py STAGE NAME TIME OUT: the files below STAGE as a tar.gz in which they are below the folder NAME."""

import os
import sys

from archive import Tar, files_below, gzipped, read


def main() -> None:
    stage, name, time, out = sys.argv[1:]
    tar = Tar(int(time))
    for path in files_below(stage):
        source = os.path.join(stage, path)
        tar.file(f"{name}/{path}", read(source), 0o755 if os.access(source, os.X_OK) else 0o644)
    with open(out, "wb") as file:
        file.write(gzipped(tar.finished()))


main()
