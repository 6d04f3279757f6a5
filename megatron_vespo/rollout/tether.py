"""Become another program that the kernel kills when the parent process dies, however it dies.

    python tether.py PARENT_PID PROGRAM ARGUMENT...

The setting survives exec, so this needs no code between fork and exec in a process that has threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, program = int(sys.argv[1]), sys.argv[2]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # else it died before the line above, and nobody would kill us
        os.execv(program, sys.argv[2:])
