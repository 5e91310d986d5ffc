"""A process whose file-system operations are counted, so that it can be killed at, or refused, any one of them."""

from __future__ import annotations

import errno
import os
import sys
import traceback

KILLED = 77
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Disk:
    """Sees every operation of this process that changes something below `root`, before it is done.

    `strike()` is called at operation number `at`. There is no way back: only for processes that end soon.
    """

    def __init__(self, root, strike, at=None):
        self.root, self.strike, self.at = str(root), strike, at
        self.log = []  # "rename step-00000003.partial", paths relative to root
        self.durable = {os.lstat(os.path.join(path, name)).st_ino for path, _, names in os.walk(root) for name in names}
        self._fsync, os.fsync = os.fsync, self._sync
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if event == "open" and isinstance(args[0], str) and args[2] & WRITING:
            self._operation("write", args[0], forget=True)
        elif event in ("os.remove", "os.rmdir"):
            self._operation(event.partition(".")[2], args[0], args[1], forget=True)
        elif event == "os.mkdir":
            self._operation("mkdir", args[0], args[2])
        elif event == "os.rename":
            self._operation("rename", args[0], args[2])

    def _sync(self, descriptor):
        self._operation("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        self.durable.add(os.fstat(descriptor).st_ino)

    def _operation(self, what, path, folder=-1, forget=False):
        path = os.fspath(path)
        if not os.path.isabs(path):
            path = os.path.join(os.getcwd() if folder == -1 else os.readlink(f"/proc/self/fd/{folder}"), path)
        if path != self.root and not path.startswith(self.root + os.sep):
            return
        number = len(self.log)
        self.log.append(f"{what} {os.path.relpath(path, self.root)}")
        if number == self.at:
            self.at = None
            self.strike(self)
        if forget and os.path.lexists(path):
            self.durable.discard(os.lstat(path).st_ino)


def kill(disk):
    """What SIGKILL leaves: all that was written so far, but for what waits in the process's own buffers."""
    os._exit(KILLED)


def cut_power(disk):
    """What a power cut may leave: of files that were not made durable, half."""
    for path, _, names in os.walk(disk.root):
        for name in names:
            file = os.path.join(path, name)
            if os.lstat(file).st_ino not in disk.durable:
                os.truncate(file, os.path.getsize(file) // 2)
    os._exit(KILLED)


def refuse(disk):
    raise OSError(errno.ENOSPC, "No space left on device")


def struck(root, strike, at, job):
    """Run `job` in a forked process that is struck at operation `at` below `root`; whether it came to that."""
    child = os.fork()
    if child == 0:
        try:
            Disk(root, strike, at)
            job()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), "the job failed by itself"
    return code == KILLED


def log_of(root, job, path):
    """The operations of `job` below `root`, in order. `path`: a file to bring them from the process that does it."""

    def logged():
        disk = Disk(root, None)
        job()
        path.write_text("\n".join(disk.log))

    assert not struck(root, None, None, logged)
    return path.read_text().splitlines()
