"""What several benchmarks need: sizes as people write them, and control groups with a limit of memory (Linux, as root)."""

import contextlib
import os
import pathlib

GROUPS = pathlib.Path("/sys/fs/cgroup")


def size(text):
    """Bytes of `4GiB` and the like."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("GB", 10**9)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)


@contextlib.contextmanager
def limited(memory):
    """A function that moves the calling process into a control group of so many bytes, page cache included: for `preexec_fn`.

    The group is of version 2, or of version 1 where that one has the memory. Without `memory` there is no group, and nothing is returned.
    """
    if not memory:
        yield None
        return
    version_1 = GROUPS / "memory"
    folder = (version_1 if version_1.is_dir() else GROUPS) / f"sluice-bench-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")).write_text(str(memory))
        yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        folder.rmdir()
