"""Run by raylets for each worker, in the place of Ray's setup_worker.py and default_worker.py: tests/forked_workers.py.

It asks for a fork of the warm process, which has this one's arguments, environment, folder and output, and lives as
long. It imports next to nothing.
"""

import json
import os
import socket
import sys

WARM_PROCESS = "RAYSUBSET_TESTS_WARM_PROCESS"  # environment variable: the socket at which the warm process listens

if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[WARM_PROCESS])
        socket.send_fds(connection, [b"."], [1, 2])
        connection.sendall(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # which the fork never answers: until it has ended
