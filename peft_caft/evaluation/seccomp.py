"""A Linux system call filter against new processes, signals, sockets and changes of files.

`sandbox` runs this file in a process that has only Python's standard library.
"""

import ctypes
import errno
import platform
import struct
import sys

# Numbers of system calls, from arch/x86/entry/syscalls/syscall_64.tbl and
# include/uapi/asm-generic/unistd.h of Linux (arm64 lacks the old calls).
_X86_64 = {
    "open": 2, "rename": 82, "rmdir": 84, "mkdir": 83, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "chown": 92,
    "lchown": 94, "mknod": 133, "fork": 57, "vfork": 58, "clone": 56, "execve": 59, "kill": 62, "truncate": 76, "ftruncate": 77,
    "fchmod": 91, "fchown": 93, "utime": 132, "utimes": 235, "futimesat": 261,
    "socket": 41, "connect": 42, "bind": 49, "ptrace": 101, "mount": 165, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129,
    "openat": 257, "mkdirat": 258, "mknodat": 259, "fchownat": 260, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
    "fchmodat": 268, "utimensat": 280, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "process_vm_writev": 311, "renameat2": 316,
    "execveat": 322, "rt_tgsigqueueinfo": 297,
}  # fmt: skip
_ARM64 = {
    "mknodat": 33, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "mount": 40, "truncate": 45,
    "ftruncate": 46, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55, "openat": 56, "utimensat": 88, "ptrace": 117, "kill": 129,
    "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "socket": 198, "bind": 200, "connect": 203, "clone": 220, "execve": 221,
    "rt_tgsigqueueinfo": 240, "process_vm_writev": 271, "renameat2": 276, "execveat": 281, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7,
}  # fmt: skip
# Calls added since Linux 5.1 have the same number on every architecture.
_EVERYWHERE = {"pidfd_send_signal": 424, "io_uring_setup": 425, "fchmodat2": 452}
# The flags of these lie in memory, where a filter cannot look; libraries fall back on older calls.
_ABSENT = {"clone3": 435, "openat2": 437}
_ARCHITECTURES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _ARM64)}

_CLONE_THREAD = 0x10000
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # of the packet filter's machine
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data, arguments of 8 bytes, little endian
_X32 = 0x40000000  # the third set of numbers on x86-64


def restrict() -> bool:
    """Install the filter, and return whether that was possible."""
    if not sys.platform.startswith("linux") or platform.machine() not in _ARCHITECTURES or struct.calcsize("P") != 8:
        return False
    program = b"".join(struct.pack("HBBI", *step) for step in _program(platform.machine()))
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    pointer = ctypes.create_string_buffer(header)
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    no_new_privileges = prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS, which a filter needs
    # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    return no_new_privileges and prctl(22, 2, ctypes.addressof(pointer), 0, 0) == 0


def _program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter as steps (operation, steps to skip if true, if false, operand)."""
    audit, numbers = _ARCHITECTURES[machine]
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    ]
    denied = numbers | _EVERYWHERE
    flags = {"open": 1, "openat": 2}
    for name, number in denied.items():
        if name in flags:
            steps += _where(number, flags[name], [(_ANY_BIT, 0, 1, _WRITING), (_RETURN, 0, 0, _ERROR | errno.EPERM)])
        elif name == "clone":
            steps += _where(number, 0, [(_ANY_BIT, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, _ERROR | errno.EPERM)])
        else:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | errno.EPERM)]
    for number in _ABSENT.values():
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


def _where(number: int, argument: int, then: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Apply ``then`` to the low half of an argument of one call, then load its number again."""
    inside = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *then, (_LOAD, 0, 0, _NUMBER)]
    return [(_EQUAL, 0, len(inside), number), *inside]
