"""Ends a server with its parent: ``python -I watchdog.py FD COMMAND...`` runs COMMAND until it ends or FD closes.

FD is the read end of a pipe whose other end only the starting process holds. When that process ends, by whatever
means, the kernel closes the pipe and the whole process group of the server is ended: SIGTERM first, SIGKILL after
a grace period. Standard library only, so that it starts in a few milliseconds.
"""

import os
import select
import signal
import subprocess
import sys

GRACE_S = 8.0
_POLL_S = 0.25


def main(descriptor: int, command: list[str]) -> int:
    """Run ``command`` in this process's group; returns its exit code, or never when FD was closed."""
    os.set_inheritable(descriptor, False)
    with subprocess.Popen(command) as server:
        while server.poll() is None:
            readable, _, _ = select.select([descriptor], [], [], _POLL_S)
            if readable and not os.read(descriptor, 1):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.killpg(0, signal.SIGTERM)
                try:
                    server.wait(GRACE_S)
                finally:
                    os.killpg(0, signal.SIGKILL)  # the server's own children, and this process
        code = server.returncode
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
