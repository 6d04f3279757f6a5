"""Run a program, and end this whole process group when the parent process dies, however it dies.

    python tether.py PARENT_PID PROGRAM ARGUMENT...

The kernel tells us of the parent's death, and kills the program at ours.  We stay beside the program because its
own children are tied to it only after their imports: until then a killed parent would leave them behind.
"""

import ctypes
import os
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1


def main(parent: int, argv: list[str]) -> int:
    """Exit status of the program; if a signal ended it, the same signal ends us."""
    libc = ctypes.CDLL(None, use_errno=True)
    signal.signal(signal.SIGUSR1, _end_the_group)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the program, with whose end we end
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() != parent:  # it died before the line above, and nobody would tell us
        return 1
    me = os.getpid()
    program = os.fork()
    if program == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == me:
            os.execv(argv[0], argv)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(me, -status)
    return status


def _end_the_group(_: int, __: FrameType | None) -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
