"""The first process inside the sandbox: makes the walls, then becomes the program.  Standard library only.

Started by `align.verifiers.sandbox` as `python -I -S sandbox_init.py <settings fd> <status fd>`.  The walls, in order:
new namespaces (mounts, processes, network, IPC, host name; a user namespace where we are not root), a root that holds
nothing but the system's read-only libraries and a scratch folder in memory, no capabilities and no way to new ones,
limits on memory, processor time, processes and files, and a filter of system calls.  A step that fails is written to
the status fd and ends the process: the program never runs with a wall missing.

Process tree: this one, outside, waits; its child is process 1 inside, and when that ends the kernel kills all others.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
WALLS = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
AT_FDCWD, AT_RECURSIVE, MNT_DETACH = -100, 0x8000, 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 24, 38, 22
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
FORBIDDEN = {
    # Network; memory that outlives a process or is in nobody's limit; other processes; the kernel and its namespaces.
    "x86_64": (
        41, 29, 64, 68, 240, 319, 447, 101, 310, 311, 312, 438, 165, 166, 155, 161, 272, 308, 428, 429, 430, 431, 432,
        433, 442, 303, 304, 169, 167, 168, 175, 313, 176, 246, 320, 321, 298, 323, 248, 249, 250, 425, 426, 427, 163,
        103, 179, 135, 164, 227, 172, 173, 154, 300,
    ),
    "aarch64": (
        198, 194, 190, 186, 180, 279, 447, 117, 270, 271, 272, 438, 40, 39, 41, 51, 97, 268, 428, 429, 430, 431, 432,
        433, 442, 264, 265, 142, 224, 225, 105, 273, 106, 104, 294, 280, 241, 282, 217, 218, 219, 425, 426, 427, 89,
        116, 60, 92, 170, 112, 262,
    ),
}  # fmt: skip
"""socket shmget semget msgget mq_open memfd_create memfd_secret ptrace process_vm_readv process_vm_writev kcmp
pidfd_getfd mount umount2 pivot_root chroot unshare setns open_tree move_mount fsopen fsconfig fsmount fspick
mount_setattr name_to_handle_at open_by_handle_at reboot swapon swapoff init_module finit_module delete_module
kexec_load kexec_file_load bpf perf_event_open userfaultfd add_key request_key keyctl io_uring_setup io_uring_enter
io_uring_register
acct syslog quotactl personality settimeofday clock_settime, and on x86 iopl ioperm modify_ldt; fanotify_init last."""

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def main() -> NoReturn:
    """Read the settings, build the walls, run the program, end with its status (128 + n where signal n killed it)."""
    settings_fd, status_fd = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(status_fd, False)
    try:
        with os.fdopen(settings_fd, "rb") as file:
            settings = json.load(file)
        _checked("prctl(PDEATHSIG)", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        machine = platform.machine()
        if machine not in AUDIT_ARCH:
            raise OSError(errno.ENOSYS, f"there is no system-call filter for {machine}")
        root = os.geteuid() == 0
        _enter_namespaces(root)
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # where the machine runs out of memory, this goes first
        child = os.fork()
    except BaseException as error:
        _refuse(status_fd, error)
    if child == 0:
        _first_process(settings, root, machine, status_fd)
    os.close(status_fd)
    os._exit(_status_of(os.waitpid(child, 0)[1]))


def _first_process(settings: dict[str, Any], root: bool, machine: str, status_fd: int) -> NoReturn:
    """Process 1: the file system, then the program as its child; ends with it, and with it all that it started."""
    try:
        _checked("prctl(PDEATHSIG)", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        _enter_file_system(settings, root, machine)
        program = os.fork()
        if program == 0:
            os.setsid()
            _limit(settings, root)
            _drop_privileges(settings["uid"] if root else None)
            _filter_calls(machine)
            os.execve(settings["command"][0], settings["command"], settings["environment"])
    except BaseException as error:
        _refuse(status_fd, error)
    os.close(status_fd)
    for fd in (0, 1, 2):
        os.close(fd)  # the reader must see the end when the program ends
    while True:
        ended, status = os.wait()
        if ended == program:
            os._exit(_status_of(status))


def _status_of(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _refuse(status_fd: int, error: BaseException) -> NoReturn:
    os.write(status_fd, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
    os._exit(125)


def _checked(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _enter_namespaces(root: bool) -> None:
    uid, gid = os.getuid(), os.getgid()
    _checked("unshare", libc.unshare(WALLS | (0 if root else CLONE_NEWUSER)))
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _checked(f"mount {target}", libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]))


def _restrict_mount(path: str, attributes: int, recursive: bool = True) -> None:
    """mount_setattr(2): adds flags, to all mounts below too, and keeps those that are there."""
    wanted = ctypes.create_string_buffer(struct.pack("QQQQ", attributes, 0, 0, 0))
    flags = AT_RECURSIVE if recursive else 0
    result = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, wanted, ctypes.c_size_t(32))
    _checked(f"mount_setattr {path}", result)


def _enter_file_system(settings: dict[str, Any], root: bool, machine: str) -> None:
    """A root in memory with the listed system folders, read-only, four devices, and /scratch with the program."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    top = "/proc"  # a folder that every machine has and nothing below is needed of: in this namespace only
    _mount("none", top, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    for path in settings["folders"]:
        _bind(path, top + path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    for name in ("null", "zero", "random", "urandom"):
        _bind(f"/dev/{name}", f"{top}/dev/{name}", ATTR_NOSUID | ATTR_NOEXEC)
    scratch = f"{top}/scratch"
    os.mkdir(scratch)
    size = settings["disk_bytes"]
    _mount("none", scratch, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=4096,mode=0777")
    for name, text in settings["files"].items():
        with open(f"{scratch}/{name}", "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        os.chmod(f"{scratch}/{name}", 0o444)
    _restrict_mount(top, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, recursive=False)
    os.chdir(top)
    _checked("pivot_root", libc.syscall(SYS_PIVOT_ROOT[machine], b".", b"."))
    _checked("umount2", libc.umount2(b".", MNT_DETACH))
    os.chdir("/scratch")


def _bind(source: str, target: str, attributes: int) -> None:
    """The same file or folder under the new root; a link stays a link."""
    if os.path.islink(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "x").close()
    _mount(source, target, None, MS_BIND | MS_REC)
    _restrict_mount(target, attributes)


def _limit(settings: dict[str, Any], root: bool) -> None:
    """Limits of each process; only the number of processes is counted over all."""
    own = 0 if root else 2  # in the user namespace the two processes around the program count too
    wanted = {
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_CPU: settings["cpu_s"],
        resource.RLIMIT_FSIZE: settings["disk_bytes"],
        resource.RLIMIT_NPROC: settings["processes"] + own,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _drop_privileges(uid: int | None) -> None:
    """No capability now or later; as root also another user, of whom nothing else on the machine is."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # past the last that this kernel knows
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _checked("prctl(NO_NEW_PRIVS)", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    _checked("capset", libc.capset(header, ctypes.create_string_buffer(24)))


def _filter_calls(machine: str) -> None:
    """A seccomp filter: what is forbidden fails with EPERM; another machine's calls end the process."""
    load, equal, at_least, masked, give = 0x20, 0x15, 0x35, 0x45, 0x06  # opcodes of classic BPF
    allow, refuse, unknown, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    namespaces = WALLS | CLONE_NEWUSER | CLONE_NEWTIME
    code = [
        (load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (give, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill),
        (equal, 0, 1, CLONE3), (give, 0, 0, unknown),  # its flags are in memory, where no filter sees them
        (equal, 0, 4, CLONE[machine]), (load, 0, 0, 16), (masked, 0, 1, namespaces & ~0xFF),
        (give, 0, 0, refuse), (give, 0, 0, allow),
    ]  # fmt: skip
    for number in FORBIDDEN[machine]:
        code += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    code.append((give, 0, 0, allow))
    packed = b"".join(struct.pack("HBBI", *step) for step in code)
    program = Filter(len(code), packed)
    _checked("seccomp", libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0))


if __name__ == "__main__":
    main()
