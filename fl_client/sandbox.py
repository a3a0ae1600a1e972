"""What the process that trains can no longer ask of the operating system: connections, programs, other processes.

On Linux a seccomp filter says no, in the kernel, to every thread of the process and for the rest of its life: no sockets of any
kind, no connection over one that it may have inherited, no new process and no program, no look into another process, no
io_uring (which would go around the filter), no namespaces, mounts, keyrings or kernel modules. Each of these fails with EPERM, so
what tries it gets an ordinary error. What is left: files, memory, threads, the pipes to the node.

Where the kernel does not permit that (another system, an old kernel, some container runtimes), Python's audit hook refuses the
same calls made from Python. That is weaker: compiled code and ctypes pass it by.

Before that, an empty file system is put over the folder with the site's keys, in a mount namespace of the process's own, where
the system permits it: it runs as the user of the node, and could open the key otherwise. What else this user may open stays open.
`Shield` says what holds, and people are told.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import socket
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.errors import IsocenterError

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000
AT_NUMBER, AT_ARCHITECTURE, AT_FIRST_ARGUMENT = 0, 4, 16  # in struct seccomp_data, little-endian
X32 = 0x40000000  # numbers from here on are those of the x32 ABI, which would be a second door
CLONE_THREAD = 0x00010000
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
SET_MODE_FILTER, FLAG_TSYNC = 1, 1
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MOUNT_RECURSIVE, MOUNT_SLAVE = 0x4000, 0x80000
MOUNT_EMPTY = 1 | 2 | 4 | 8  # read-only, nosuid, nodev, noexec
CHECK_S = 60.0
TRY = (
    "import sys; from fl_client.sandbox import Shield, confine, hide; print(Shield(hide(sys.argv[1]), confine()).word)"
)
OPEN_CALLS = (
    "the kernel does not confine the process that trains; a hook in Python refuses connections and programs, which compiled "
    "code could pass by. Use Linux 3.17 or later on x86-64 or ARM64, and a container runtime that permits seccomp; until then "
    "let a firewall keep this machine from all addresses but the coordinator's."
)
OPEN_KEYS = (
    "the process that trains could open this site's key, because this system lets no user have a mount namespace. Permit user "
    "namespaces (or, in a container that runs as root, CAP_SYS_ADMIN)."
)


@dataclass(frozen=True)
class Shield:
    """What holds a process that trains back. `keys_hidden`: the keys' folder is empty to it; `filtered`: by the kernel."""

    keys_hidden: bool
    filtered: bool

    @property
    def word(self) -> str:
        return f"keys-{'hidden' if self.keys_hidden else 'open'} {'seccomp' if self.filtered else 'hook'}"

    @classmethod
    def of(cls, word: object) -> "Shield":
        """The one whose `word` this is; anything else is no shield."""
        for hidden, filtered in ((True, True), (True, False), (False, True)):
            if word == cls(hidden, filtered).word:
                return cls(hidden, filtered)
        return cls(keys_hidden=False, filtered=False)

    @property
    def gaps(self) -> list[str]:
        """A sentence, with a remedy, for each thing that does not hold."""
        return [OPEN_CALLS] * (not self.filtered) + [OPEN_KEYS] * (not self.keys_hidden)


@dataclass(frozen=True)
class Machine:
    """The numbers of one architecture (linux/audit.h, asm/unistd.h)."""

    audit: int
    seccomp: int
    clone: int
    clone3: int
    denied: dict[str, int]


_X86_64 = Machine(
    audit=0xC000003E,
    seccomp=317,
    clone=56,
    clone3=435,
    denied={
        **{"socket": 41, "connect": 42, "accept": 43, "sendto": 44, "sendmsg": 46, "recvmsg": 47, "bind": 49},
        **{"listen": 50, "socketpair": 53, "accept4": 288, "recvmmsg": 299, "sendmmsg": 307},
        **{"fork": 57, "vfork": 58, "execve": 59, "execveat": 322},
        **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_open": 434, "pidfd_getfd": 438},
        **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
        **{"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433},
        **{"unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161},
        **{"mount_setattr": 442},
        **{"add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298},
        **{"init_module": 175, "finit_module": 313, "kexec_load": 246, "open_by_handle_at": 304},
    },
)
_AARCH64 = Machine(
    audit=0xC00000B7,
    seccomp=277,
    clone=220,
    clone3=435,
    denied={
        **{"socket": 198, "connect": 203, "accept": 202, "sendto": 206, "sendmsg": 211, "recvmsg": 212, "bind": 200},
        **{"listen": 201, "socketpair": 199, "accept4": 242, "recvmmsg": 243, "sendmmsg": 269},
        **{"execve": 221, "execveat": 281},  # it has no fork and vfork
        **{"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_open": 434, "pidfd_getfd": 438},
        **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
        **{"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433},
        **{"unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51},
        **{"mount_setattr": 442},
        **{"add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "userfaultfd": 282, "perf_event_open": 241},
        **{"init_module": 105, "finit_module": 273, "kexec_load": 104, "open_by_handle_at": 265},
    },
)
MACHINES = {"x86_64": _X86_64, "aarch64": _AARCH64}
WITHOUT_ARGUMENTS = {"fork", "vfork"}  # a try would not fail but happen
HOOKED = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn")


def keep_private() -> None:
    """No core file of this process, which would hold images or keys, and no look into it by another process of this user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, *_longs(0, 0, 0, 0))


def hide(folder: str) -> bool:
    """Whether `folder` is empty to this process from now on, and to it alone. Before its first thread, or it fails."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWNS) != 0:
        # Root is left out: in a namespace of users it would lose its rights to other users' images.
        user, group = os.geteuid(), os.getegid()
        if user == 0 or libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
            return False
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        except OSError:
            return False
    # Later mounts of this machine still arrive here (images may be mounted when they are first asked for); ours go nowhere.
    if libc.mount(None, b"/", None, MOUNT_RECURSIVE | MOUNT_SLAVE, None) != 0:
        return False
    return bool(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", MOUNT_EMPTY, b"size=4k,mode=000") == 0)


def confine() -> bool:
    """Confine this process and all its threads for the rest of its life; whether the kernel does it, which was tried out then."""
    keep_private()
    machine = MACHINES.get(platform.machine()) if sys.platform == "linux" and sys.byteorder == "little" else None
    if machine is not None and _install(machine) and _holds(machine):
        return True
    sys.addaudithook(_hook)
    return False


def require(folder: Path) -> None:
    """Raise IsocenterError unless a process that trains would be kept from `folder` and from connections; tried in a process."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with tempfile.TemporaryDirectory() as instead:  # before joining there is no folder of keys to try it on
        command = [sys.executable, "-P", "-c", TRY, str(folder if folder.is_dir() else instead)]
        found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=CHECK_S, check=False)
    if gaps := Shield.of(found.stdout.strip()).gaps:
        raise IsocenterError(gaps[0], remedy=" ".join(gaps[1:]))


def program(machine: Machine) -> list[tuple[int, int, int, int]]:
    """The filter as (code, jump if true, jump if false, value); jumps count the instructions that are passed over."""
    refuse = (RETURN, 0, 0, FAIL_WITH | errno.EPERM)
    made = [(LOAD, 0, 0, AT_ARCHITECTURE), (JUMP_EQUAL, 1, 0, machine.audit), refuse, (LOAD, 0, 0, AT_NUMBER)]
    if machine is _X86_64:
        made += [(JUMP_AT_LEAST, 0, 1, X32), refuse]
    for number in machine.denied.values():
        made += [(JUMP_EQUAL, 0, 1, number), refuse]
    # Its arguments are out of the filter's sight; a C library that is told it does not exist uses clone instead.
    made += [(JUMP_EQUAL, 0, 1, machine.clone3), (RETURN, 0, 0, FAIL_WITH | errno.ENOSYS)]
    made += [
        (JUMP_EQUAL, 0, 3, machine.clone),
        (LOAD, 0, 0, AT_FIRST_ARGUMENT),
        (JUMP_BITS, 1, 0, CLONE_THREAD),
        refuse,
    ]
    return [*made, (RETURN, 0, 0, ALLOW)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _install(machine: Machine) -> bool:
    """Whether the kernel took the filter for every thread of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    lines = program(machine)
    text = b"".join(struct.pack("<HBBI", *line) for line in lines)
    given = _Program(len(lines), text)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, *_longs(1, 0, 0, 0)) != 0:
        return False
    return bool(libc.syscall(*_longs(machine.seccomp, SET_MODE_FILTER, FLAG_TSYNC), ctypes.byref(given)) == 0)


def _longs(*values: int) -> list[ctypes.c_long]:
    """Arguments in a register's full width: the kernel looks at all of it."""
    return [ctypes.c_long(value) for value in values]


def _holds(machine: Machine) -> bool:
    """Whether everything is refused that should be, tried with arguments that no call could mean."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name, number in machine.denied.items():
        if name in WITHOUT_ARGUMENTS:
            continue
        ctypes.set_errno(0)
        if libc.syscall(*_longs(number, -1, -1, -1, -1, -1, -1)) != -1 or ctypes.get_errno() != errno.EPERM:
            return False
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        with contextlib.suppress(PermissionError):
            socket.socket(family, socket.SOCK_STREAM).close()
            return False
    return True


def _hook(event: str, _: tuple[Any, ...]) -> None:
    if event.startswith(HOOKED):
        raise PermissionError(errno.EPERM, f"the process that trains may not do this ({event})")
