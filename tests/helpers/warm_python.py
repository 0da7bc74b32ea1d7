"""A python that has imported everything: what it runs starts within a tenth of a second, where torch alone takes seconds.

A process behind a socket forks what is to run; what is started in place of python is the process that everybody sees. Signals
sent to it are passed on, the fork begins in its namespaces, and one ends with the other. It is not python in all: a fork is no
child of its launcher, has the server's limits and CPUs, and ends after what atexit does, without the interpreter's own end.
Some tests start the real one for that.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import platform
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# What runs import, also late.
IMPORTED = (
    *("glsd.cli.pretrain", "glsd.cli.finetune", "glsd.cli.evaluate", "glsd.slurm.flags", "glsd.cli.door"),
    *("glsd.pretrain.dry_run", "glsd.finetune.train", "glsd.evaluate.run"),
    *("torch.utils.tensorboard", "fsspec.implementations.http", "s3fs"),
)
# QUIT stands for kill -9 of the fork and its loader processes: the client, which ends when they have, must not die of it.
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGQUIT)
LONGEST = 1 << 17  # bytes of an order


@functools.cache
def warm_python() -> str:
    """Return the path of a program that runs scripts (and ``-c`` code) as python does; where it cannot, that of python."""
    if not sys.platform.startswith("linux"):
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm_python"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path, program = folder / "socket", folder / "python"
    words = shlex.join([sys.executable, "-IS", __file__, str(path)])
    program.write_text(f'#!/bin/sh\n[ "$1" != -u ] || shift\nexec {words} "$@"\n')
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen(64)
        server = subprocess.Popen(
            [sys.executable, __file__, str(listening.fileno())],
            pass_fds=[listening.fileno()],
            stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            },
            start_new_session=True,
        )
    atexit.register(server.kill)
    return str(program)


def run(path: str, words: list[str]) -> None:
    """Be python: have the server run ``words``, a script and its arguments, and end as that does."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(path)
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is somebody to pass them on to
    deaf = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: pass_on(server, number))
    order = {"argv": words, "env": dict(os.environ), "folder": os.getcwd(), "deaf": deaf}
    socket.send_fds(server, [json.dumps(order).encode()], [0, 1, 2])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    code = int(server.recv(100) or -signal.SIGKILL)  # nothing: the server is gone
    if code < 0:
        with contextlib.suppress(OSError):  # the action of KILL cannot be set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def pass_on(server: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the server is gone, which its silence tells
        server.send(str(number).encode())


class Server:
    """Forks what is asked for, passes signals on to it and its end back."""

    def __init__(self, listening: socket.socket) -> None:
        self._events = selectors.DefaultSelector()
        self._events.register(listening, selectors.EVENT_READ)
        self._listening = listening
        self._forks: dict[socket.socket, int] = {}  # pids

    def next_fork(self) -> dict[str, Any]:
        """Serve until a fork comes out of here, with its order."""
        while True:
            for key, _ in self._events.select():
                if key.fileobj is self._listening:
                    client, _ = self._listening.accept()
                    self._events.register(client, selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket):
                    if order := self._hear(key.fileobj):
                        return order
                else:
                    self._bury(key.fd, *key.data)

    def _hear(self, client: socket.socket) -> dict[str, Any] | None:
        """Take what a client sends, nothing when it is gone; return the order in the fork that was made for it."""
        try:
            message, files, _, _ = socket.recv_fds(client, LONGEST, 3)
        except ConnectionResetError:  # killed with an answer unread
            message, files = b"", []
        if files:
            if self._fork(client):
                for target, file in enumerate(files):
                    os.dup2(file, target)
                return json.loads(message)
            for file in files:
                os.close(file)
        elif client in self._forks:
            number = int(message or signal.SIGKILL)
            pid = self._forks[client]
            if number == signal.SIGQUIT:
                with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
                    os.killpg(pid, signal.SIGKILL)
                number = signal.SIGKILL
            os.kill(pid, number)
        if not message:
            self._events.unregister(client)
            client.close()
        return None

    def _fork(self, client: socket.socket) -> bool:
        """Return True in the fork."""
        inside, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        pid = -1
        try:
            with entering(inside) if is_elsewhere(inside) else contextlib.nullcontext(lambda: None) as enter:
                pid = os.fork()
                if pid == 0:
                    enter()
                    return True
        except OSError:  # its host is being killed, and the client with it
            if pid == 0:
                os._exit(1)
            return False
        self._forks[client] = pid
        self._events.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, client))
        return False

    def _bury(self, pidfd: int, pid: int, client: socket.socket) -> None:
        """Tell a client how its fork has ended, which ends it."""
        self._events.unregister(pidfd)
        os.close(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        del self._forks[client]
        with contextlib.suppress(OSError):  # it is gone
            client.send(str(code).encode())


def serve(listening: socket.socket) -> None:
    """Be the warm process, which ends with the tests. A fork comes out of ``next_fork`` and is a program of its own."""
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    sys.path.insert(1, str(ROOT))  # the first place is that of the script
    for module in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):  # s3fs is an extra
            importlib.import_module(module)
    Image.init()
    assert threading.active_count() == 1, f"a thread would not survive a fork: {threading.enumerate()}"
    gc.freeze()  # a fork that ends would look at every object, and copy its page, for seconds
    order = Server(listening).next_fork()
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    os.setsid()
    for number in order["deaf"]:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["env"])
    platform._uname_cache = None  # type: ignore[attr-defined]  # the name of the host where it was warmed
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
    sys.argv = order["argv"]
    sys.orig_argv[:] = [sys.executable, *sys.argv]
    end = 0
    try:
        if sys.argv[0] == "-c":
            code = sys.argv.pop(1)
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as asked:
        end = int(asked.code or 0)
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads, as python does
    # The interpreter itself is not torn down: libraries would report as leaked what is frozen.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end)


if __name__ == "__main__":
    if sys.argv[2:]:
        run(sys.argv[1], sys.argv[2:])
    else:
        sys.path.append(str(ROOT))
        from PIL import Image

        from tests.cluster.namespaces import (
            DIE_WITH_PARENT,
            entering,
            is_elsewhere,
            libc,
        )

        serve(socket.socket(fileno=int(sys.argv[1])))
