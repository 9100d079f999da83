"""Runs a program that dies with the thread that started it: `python tether.py PARENT PROGRAM ARGUMENT...`.

An actor can be killed in ways that leave it no time to end its server, which would then hold the memory that the next
server needs. So the system is told to do it (`PR_SET_PDEATHSIG`, which stays over `exec`). This is a program of its
own because nothing but the new process itself can ask for that.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Becomes the program."""
    parent, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent):
        # It died before the system was told.
        sys.exit("the actor is gone")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
