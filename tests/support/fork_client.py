"""
The command line of a Python that runs in a fork of `tests/support/fork_server.py`.

    python -IS tests/support/fork_client.py SOCKET [-u] (-m MODULE | -c CODE | FILE) ARGUMENT ...
"""

import json
import os
import socket
import sys


if __name__ == "__main__":
    _, address, *arguments = sys.argv
    request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        # The fork reads and writes what this process would
        socket.send_fds(server, [b"%20d" % len(request)], [0, 1, 2])
        server.sendall(request)
        # Nothing where the server has failed
        sys.exit(int(server.recv(20) or 1))
