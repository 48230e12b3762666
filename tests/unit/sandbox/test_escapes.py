"""Programs that try to leave the sandbox: each is told by its effect outside, or by what it could read."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergeopd.errors import SandboxError
from mergeopd.sandbox.client import Limits, Sandbox, ScriptOutcome
from mergeopd.sandbox.isolation import MECHANISMS

LIMITS = Limits(timeout_s=0.7, memory_mb=128, file_mb=1)
SECRET = "the secret of the machine"

# Each program prints `out` if it could do what its name says.
ATTEMPTS = {
    "connect to a server": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1); print('out')",
    "send a datagram": "import socket\nsocket.socket(2, 2).sendto(b'x', ('127.0.0.1', PORT)); print('out')",
    "socket by system call": "import ctypes\nif ctypes.CDLL(None).socket(2, 1, 0) >= 0: print('out')",
    "read a file outside": "print(open(FILE).read())",
    "read it through a link": "import os\nos.symlink(FILE, 'link')\nprint(open('link').read())",
    "write a file outside": "open(FILE, 'w').write('changed'); print('out')",
    "remove a file outside": "import os\nos.remove(FILE); print('out')",
    "truncate a file outside": "import os\nos.truncate(FILE, 0); print('out')",
    "change the mode of a file outside": "import os\nos.chmod(FILE, 0o777); print('out')",
    "list the home folder": "import os\nos.listdir(os.path.dirname(FILE)); print('out')",
    "read third-party packages": "import torch; print('out')",
    "start a process": "import subprocess\nsubprocess.run(['/bin/true'], check=True); print('out')",
    "replace the process": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(\"out\")'])",
    "fork bomb": "import os\nwhile True:\n    os.fork(); print('out', flush=True)",
    "thread bomb": """
import threading, time
threading.stack_size(32768)
for number in range(100000):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print('out')""",
    "memory bomb": "blocks = []\nwhile True:\n    blocks.append(bytearray(1 << 24)); print('out' * (len(blocks) > 20))",
    "shared memory": "import mmap\nmmap.mmap(-1, 1 << 28); print('out')",
    "fill the disk": "with open('big', 'wb') as file:\n    for _ in range(64): file.write(b'x' * (1 << 20))\nprint('out')",
    "infinite loop": "while True: pass",
    "sleep": "import time\ntime.sleep(3600)",
    "ignore signals": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except Exception: pass\nwhile True: pass",
    "flood the output": "while True: print('x' * 65536)",
    "kill the parent": "import os\nos.kill(os.getppid(), 9); print('out')",
    "kill the group": "import os\nos.kill(0, 9); print('out')",
    "kill everybody": "import os\nos.kill(-1, 9); print('out')",
    "signal by ownership of a pipe": """
import fcntl, os
a, b = os.pipe()
fcntl.fcntl(a, fcntl.F_SETOWN, os.getppid()); print('out')""",
    "trace the parent": "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0: print('out')",
    "read the parent's memory": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(8)
vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
if libc.process_vm_readv(os.getppid(), vector, 1, vector, 1, 0) > 0: print('out')""",
    "environment of the parent": "import os\nprint(open(f'/proc/{os.getppid()}/environ').read(), 'out')",
    "own environment": "import os\nprint('out' if 'SECRET_TOKEN' in os.environ else '')",
    "inherited descriptors": """
import os
for number in range(3, 2000):
    try: os.fstat(number); print('out')
    except OSError: pass""",
    "a new namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0: print('out')",
    "raise the limits": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2); print('out')""",
    "limits of the parent": """
import os, resource
resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)); print('out')""",
    "a device": "import os\nos.mknod('sda', 0o60666, os.makedev(8, 0)); print('out')",
    "a pickle that runs a command": """
import os, pickle
class Command:
    def __reduce__(self): return os.system, ('echo out',)
print('out' if pickle.loads(pickle.dumps(Command())) == 0 else '')""",
}  # fmt: skip


@pytest.fixture(scope="module", params=MECHANISMS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox of every mechanism that this machine has."""
    os.environ["SECRET_TOKEN"] = SECRET
    box = Sandbox()
    try:
        box.start([request.param])
    except SandboxError as error:
        pytest.skip(str(error))
    finally:
        del os.environ["SECRET_TOKEN"]
    with box:
        yield box


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    """A file that everybody may read and write, in folders that everybody may enter."""
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0o666)
    for folder in tmp_path.parents[:3]:
        folder.chmod(0o755)
    return file


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempts_are_contained(sandbox: Sandbox, name: str, secret_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        program = f"PORT, FILE = {port}, {str(secret_file)!r}\n{ATTEMPTS[name]}"
        outcome = sandbox.run(program, "", LIMITS)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "out" not in outcome.stdout
    assert SECRET not in outcome.stdout
    assert len(outcome.stdout) <= LIMITS.file_mb << 20
    assert (secret_file.read_text(), secret_file.stat().st_mode & 0o777) == (SECRET, 0o666)
    # The server lives, and nothing of the program stays.
    after = sandbox.run("import os\nprint(os.listdir('.'), input())", "next", Limits(timeout_s=60))
    assert after == ScriptOutcome(0, "[] next\n", "")


def test_many_files_do_not_fill_the_disk(sandbox: Sandbox) -> None:
    """The sum of the files is limited too, long before the time limit."""
    program = "for n in range(10**6):\n  with open(str(n), 'wb') as file: file.write(b'x' * (1 << 20))"
    start = time.monotonic()
    assert sandbox.run(program, "", Limits(timeout_s=300)).exit_code != 0
    assert time.monotonic() - start < 250


def test_the_server_ends_with_its_owner(sandbox: Sandbox) -> None:
    """The processes of a closed sandbox are gone, also the one that runs a program."""
    with Sandbox() as other:
        assert other._process is not None
        pid = other._process.pid
        thread = threading.Thread(target=_run_until_closed, args=(other,))
        thread.start()
        while not _children(_children(pid)[0] if other.mechanism == "namespaces" else pid):
            assert thread.is_alive()
        family = [pid, *_descendants(pid)]
        os.kill(pid, signal.SIGKILL)
        thread.join()
    deadline = time.monotonic() + 60
    while any(map(_is_running, family)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [one for one in family if _is_running(one)]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_nothing_stays_of_an_owner_that_is_killed(sandbox: Sandbox, tmp_path: Path) -> None:
    """The server ends its program and removes the scratch folder."""
    script = (
        "import sys\nfrom mergeopd.sandbox.client import Limits, Sandbox\nbox = Sandbox()\n"
        f"box.start([{sandbox.mechanism!r}])\nprint(box._process.pid, flush=True)\n"
        "box.run('open(\"file\", \"w\")\\nwhile True: pass', '', Limits(timeout_s=60))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        while not _children(_children(pid)[0] if sandbox.mechanism == "namespaces" else pid):
            assert owner.poll() is None
        family = [pid, *_descendants(pid)]
        owner.kill()
    deadline = time.monotonic() + 60
    while any(map(_is_running, family)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [one for one in family if _is_running(one)]
    assert not list(tmp_path.iterdir())


def _run_until_closed(box: Sandbox) -> None:
    with pytest.raises(SandboxError):
        box.run("while True: pass", "", Limits(timeout_s=60))


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _descendants(pid: int) -> list[int]:
    children = _children(pid)
    return children + [one for child in children for one in _descendants(child)]
