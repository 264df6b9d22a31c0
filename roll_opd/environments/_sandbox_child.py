"""The near side of :mod:`roll_opd.environments.sandbox`: ``python -I -S _sandbox_child.py SPEC``.

It shuts itself in as far as ``SPEC`` (JSON) says, and then becomes the interpreter that runs the program on standard
input. Nothing but the standard library is there. Three processes come out of ``isolation: namespaces``::

    this one, outside ──► init, pid 1 of the new namespace ──► the program, with no rights and under its limits
    (killed by the        (its death takes everything in        (execve of a bare interpreter)
     parent)               the namespace along)

``ready`` is written to the descriptor ``status`` right before the program starts. Without it, what stands on standard
error is why the sandbox could not be made.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import stat
import sys
from typing import Any, NoReturn

# From the kernel's headers: <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <asm-generic/unistd.h>.
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _AT_FDCWD, _AT_RECURSIVE = 1, 2, -100, 0x8000
_SYS_MOUNT_SETATTR = 442
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38


def main(spec: dict[str, Any]) -> NoReturn:
    """Shut this process in and become the program.

    Args:
        spec: ``namespaces`` (make them here), ``visible`` (paths that the program sees, read-only), ``root`` (an empty
            folder to build its file system on), ``directory`` (its working directory), ``uid`` (to become, or null),
            ``disk_bytes`` (of that file system), ``limits`` (name of a ``RLIMIT_…`` -> value), ``status`` (descriptor),
            ``command``.
    """
    os.umask(0o022)
    if spec["namespaces"]:
        _enter_namespaces(spec["root"], spec["visible"], spec["disk_bytes"])
        _become_child_of_init()
    os.chdir(spec["directory"])
    if spec["uid"] is not None:
        os.setgroups([])
        os.setresgid(spec["uid"], spec["uid"], spec["uid"])
        os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    _libc("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Last, and lowered below what is in use, if need be: nothing but the execve comes after it.
    for name, value in spec["limits"].items():
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    os.write(spec["status"], b"ready")
    os.set_inheritable(spec["status"], False)
    os.execve(spec["command"][0], spec["command"], {})


def _enter_namespaces(root: str, visible: list[str], disk_bytes: int) -> None:
    """New namespaces of every kind that matters, and a file system of nothing but ``visible`` and an empty ``/tmp``."""
    flags = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:  # a user namespace is what lets a user make the others
        flags |= _CLONE_NEWUSER
    _libc("unshare", flags)
    if uid != 0:
        for name, value in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(value)
    _libc("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a new user namespace would undo it
    _libc("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)  # nothing from here reaches the outside
    options = f"size={disk_bytes},nr_inodes=4096,mode=755".encode("ascii")
    _libc("mount", b"tmpfs", os.fsencode(root), b"tmpfs", _MS_NOSUID | _MS_NODEV, options)
    for path in visible:
        _show(path, root + path)
    os.mkdir(f"{root}/tmp")
    os.chmod(f"{root}/tmp", 0o1777)
    # Not pivot_root: in a chroot the kernel allows no further user namespace, hence no capabilities, and without them
    # or a descriptor of a folder outside there is no way back.
    os.chroot(root)


def _show(source: str, target: str) -> None:
    mode = os.stat(source).st_mode
    os.makedirs(target if stat.S_ISDIR(mode) else os.path.dirname(target), exist_ok=True)
    if not stat.S_ISDIR(mode):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _libc("mount", os.fsencode(source), os.fsencode(target), None, _MS_BIND | _MS_REC, None)
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    path = ctypes.c_char_p(os.fsencode(target))
    _libc("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, path, _AT_RECURSIVE, ctypes.byref(attributes), size)


def _become_child_of_init() -> None:
    """Return in a grandchild that is not the new pid namespace's first process; the others wait for it here."""
    if init := os.fork():
        # A child killed by a signal ends this process by the same one, so that the parent sees it.
        _exit_like(os.waitpid(init, 0)[1])
    _libc("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _libc("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)  # not to be traced by the program, which may have the same user
    program = os.fork()
    if not program:
        os.setsid()
        return
    while True:
        pid, status = os.wait()
        if pid == program:
            _exit_like(status)


def _exit_like(status: int) -> NoReturn:
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _libc(function: str, *arguments: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{function}: {os.strerror(error)}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
