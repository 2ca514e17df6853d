"""Makes exactly N of everything, and says so.  Run inside the test's cgroup by test_known_count.py.

    python known_count.py FOLDER N CERTIFICATE

Everything that is needed is imported and opened before "ready" is printed; after a line on standard input come
N opens of FOLDER/known-…, N runs of /bin/true, N connections each over IPv4, IPv6 and a UNIX socket, and N
TLS writes and N TLS reads of one record each.
"""

import os
import socket
import ssl
import sys
import threading
from pathlib import Path


def main() -> None:
    """Do it."""
    folder, count, certificate = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for i in range(8):
        (folder / f"known-{i}").touch()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    left, right = socket.socketpair()
    shaken: list[ssl.SSLSocket] = []
    hand = threading.Thread(target=lambda: shaken.append(server.wrap_socket(right, server_side=True)))
    hand.start()
    speaker = client.wrap_socket(left)
    hand.join()
    listener = shaken[0]
    v4 = socket.create_server(("127.0.0.1", 0))
    v6 = socket.create_server(("::1", 0), family=socket.AF_INET6)
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "known.sock"))
    unix.listen(64)
    print("ready", flush=True)
    sys.stdin.readline()

    for i in range(count):
        os.close(os.open(folder / f"known-{i % 8}", os.O_RDONLY))
    for _ in range(count):
        os.waitpid(os.posix_spawn("/bin/true", ["true", "one", "t w o"], os.environ), 0)
    for family, listening in ((socket.AF_INET, v4), (socket.AF_INET6, v6), (socket.AF_UNIX, unix)):
        for _ in range(count):
            with socket.socket(family) as caller:
                caller.connect(listening.getsockname())
                listening.accept()[0].close()
    for i in range(count):
        speaker.write(b"x" * (i + 1))
        got = listener.read(count + 1)
        assert len(got) == i + 1
    print("done", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
