"""The native reader where a container permits neither io_uring nor mounts: same bytes, less speed.

A seccomp filter denies the two system calls in a child process, as container runtimes do.
"""

import subprocess
import sys

import pytest

CHILD = """
import ctypes, os, struct, sys, tempfile

IO_URING_SETUP, FSOPEN = 425, 430
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO_EPERM = 0x7FFF0000, 0x00050001
program = [
    (LOAD, 0, 0, 0),
    (JUMP_IF_EQUAL, 2, 0, IO_URING_SETUP),
    (JUMP_IF_EQUAL, 1, 0, FSOPEN),
    (RETURN, 0, 0, ALLOW),
    (RETURN, 0, 0, ERRNO_EPERM),
]
code = b"".join(struct.pack("HBBI", *step) for step in program)
instructions = ctypes.create_string_buffer(code)
filter_ = struct.pack("HxxxxxxP", len(program), ctypes.addressof(instructions))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
if libc.prctl(22, 2, ctypes.c_char_p(filter_), 0, 0) != 0:
    sys.exit(77)

from gearfall.infra.memory import native

content = os.urandom(10 * 4096 + 9)
with tempfile.NamedTemporaryFile(dir=sys.argv[1]) as file:
    file.write(content)
    file.flush()
    assert native.read_method(file.name) in ("direct", "buffered"), native.read_method(file.name)
    with native.PoolFile(2 * len(content)) as pool:
        assert pool.kind == "memfd", pool.kind
        pool.fault_in(3 * 4096)
        assert os.fstat(pool.fileno()).st_blocks * 512 == pool.faulted_bytes == 3 * 4096
        pool.resize(len(content))
        with pool.memory() as memory:
            native.read_chunks(
                file.name,
                offset_bytes=0,
                size_bytes=len(content),
                destination=memory,
                chunk_bytes=4096,
                direct=True,
                populate_threads=1,
            )
        sealed = pool.seal()
assert os.pread(sealed, len(content), 0) == content
try:
    os.pwrite(sealed, b"x", 0)
except PermissionError:
    print("as expected")
"""


def test_without_io_uring_and_mounts(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode == 77:
        pytest.skip("this machine permits no seccomp filter")
    assert done.stdout == "as expected\n", done.stderr
