"""Becomes a command that the kernel kills when our parent dies: tether.py PARENT-PID COMMAND...

util-linux's setpriv --pdeathsig asks for the same, but a parent that died before it could ask goes unnoticed. A script
of its own and no function run after fork(): our parent has threads. Reference: prctl(2), PR_SET_PDEATHSIG.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):
        sys.exit("the parent has died already")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
