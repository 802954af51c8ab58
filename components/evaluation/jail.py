"""Runs one untrusted Python program, read from stdin, with nothing to break: ``python -I -S jail.py FD MEMORY CPU``.

Started by ``components.evaluation.sandbox`` only; imports nothing but the standard library. Before the program runs,
the process is confined, in this order: resource limits (setrlimit), its namespaces where the kernel allows (no network
interfaces, no capabilities), every file but the interpreter's own, read only (Landlock), and every system call
that is not on a short list (seccomp): no sockets, no new processes or threads, no signals, no opening for writing.
It exits with status 3 without running anything when Landlock or seccomp cannot be had.

Sources: the kernel's Documentation/userspace-api/{landlock,seccomp_filter}.rst; numbers from asm/unistd.h.
"""

import ctypes
import os
import platform
import resource
import sys

UNCONFINED = 3

# (audit architecture, {system call: number}) of everything a program may still ask of the kernel.
_NAME_LIST = (
    "read write openat close fstat newfstatat lseek mmap mprotect munmap brk madvise mremap rt_sigaction "
    "rt_sigprocmask rt_sigreturn pread64 readv writev sched_yield dup dup3 nanosleep getpid exit uname getcwd "
    "gettimeofday getrusage sysinfo times getuid getgid geteuid getegid getppid sigaltstack gettid futex "
    "sched_getaffinity getdents64 restart_syscall clock_gettime clock_getres clock_nanosleep exit_group "
    "readlinkat faccessat pselect6 ppoll set_robust_list getrandom statx rseq faccessat2 getrlimit"
)
_NAMES = _NAME_LIST.split()
_X86_64 = (
    "0 1 257 3 5 262 8 9 10 11 12 28 25 13 14 15 17 19 20 24 32 292 35 39 60 63 79 96 98 99 100 102 104 107 108 "
    "110 131 186 202 204 217 219 228 229 230 231 267 269 270 271 273 318 332 334 439 97"
)
_X86_64_ONLY = "4 6 7 21 23 33 89 158"  # stat lstat poll access select dup2 readlink arch_prctl
_AARCH64 = (
    "63 64 56 57 80 79 62 222 226 215 214 233 216 134 135 139 67 65 66 124 23 24 101 172 93 160 17 169 165 179 "
    "153 174 176 175 177 173 132 178 98 123 61 128 113 114 115 94 78 48 72 73 99 278 291 293 439 163"
)
_CALLS = {
    "x86_64": (0xC000003E, dict(zip(_NAMES, map(int, _X86_64.split()), strict=True)), _X86_64_ONLY),
    "aarch64": (0xC00000B7, dict(zip(_NAMES, map(int, _AARCH64.split()), strict=True)), ""),
}

_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # deny: errno EPERM
_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_ABOVE, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER_MODE = 38, 22, 2
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def limit(memory_bytes: int, cpu_s: int) -> None:
    """Set hard limits: memory, processor time, no file growth, few files, no core."""
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 1),
    ):
        resource.setrlimit(kind, (value, value))


def close_files(readable: list[str]) -> bool:
    """Landlock: reading below ``readable``, nothing else anywhere. False when the kernel has no Landlock."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    rules = _Ruleset((1 << rights) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _libc.syscall(_LANDLOCK_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    for folder in readable:
        try:
            descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rule = _PathBeneath(_READ_FILE | _READ_DIR if os.path.isdir(folder) else _READ_FILE, descriptor)  # noqa: PTH112
        added = _libc.syscall(
            _LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0)
        )
        os.close(descriptor)
        if added != 0:
            return False
    restricted: int = _libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)
    return restricted == 0


def close_kernel() -> bool:
    """Seccomp: only the calls above; openat only for reading. False when the machine has no such filter."""
    if platform.machine() not in _CALLS:
        return False
    architecture, calls, extra = _CALLS[platform.machine()]
    plain = [number for name, number in calls.items() if name != "openat"] + [int(n) for n in extra.split()]
    program = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_JUMP_ABOVE, len(plain) + 3, 0, 0x40000000),  # x32 calls -> deny
    ]
    for index, number in enumerate(plain):
        program.append((_JUMP_EQUAL, len(plain) - index + 3, 0, number))  # -> allow
    program += [
        (_JUMP_EQUAL, 0, 2, calls["openat"]),
        (_LOAD, 0, 0, 32),  # low half of seccomp_data.args[2], the flags
        (_JUMP_SET, 0, 1, _WRITING),
        (_RETURN, 0, 0, _DENY),
        (_RETURN, 0, 0, _ALLOW),
    ]
    array = (_Instruction * len(program))(*(_Instruction(*line) for line in program))
    holder = _Program(len(program), array)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    installed: int = _libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(holder), 0, 0)
    return installed == 0


def main() -> None:
    """Confine this process, run the program, write the password or ``fail: Type`` to the given descriptor."""
    verdict, memory_bytes, cpu_s = (int(word) for word in sys.argv[1:4])
    # The word that reports success comes first, so that a program cannot simply claim it.
    password, _, program = sys.stdin.buffer.read().decode().partition("\n")
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    os.close(quiet)
    # A second layer of isolation where the kernel allows user namespaces: no network interfaces, no capabilities.
    _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC)
    limit(memory_bytes, cpu_s)
    interpreter = [sys.base_prefix, "/usr/lib", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache"]
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # Landlock demands it
    if not (close_files([*interpreter, "/dev/null", "/dev/urandom"]) and close_kernel()):
        os._exit(UNCONFINED)
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        os.write(verdict, f"fail: {type(error).__name__}".encode()[:200])
        os._exit(1)
    os.write(verdict, password.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
