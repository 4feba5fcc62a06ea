"""Peer: the floor. One thread, epoll, as little HTTP as gets an answer back: the least that Python
costs.
"""

import select
import socket
import sys

from job import Job

ANSWER = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
ANSWERS = {
    "ok": ANSWER % (200, 16, b'{"status": "ok"}'),
    "duplicate": ANSWER % (200, 23, b'{"status": "duplicate"}'),
    "unauthorized": ANSWER % (401, 25, b'{"error": "unauthorized"}'),
}


def main(port):
    """Serve until killed."""
    job, connections = Job(), {}
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    listener.setblocking(False)
    poller = select.epoll()
    poller.register(listener, select.EPOLLIN)
    while True:
        for descriptor, _ in poller.poll():
            if descriptor == listener.fileno():
                connection = listener.accept()[0]
                connection.setblocking(False)
                connections[connection.fileno()] = (connection, bytearray())
                poller.register(connection, select.EPOLLIN)
                continue
            connection, buffer = connections[descriptor]
            try:
                data = connection.recv(65536)
            except ConnectionError:
                data = b""
            close = not data
            buffer += data
            while True:
                end = buffer.find(b"\r\n\r\n")
                if end < 0:
                    break
                lines = buffer[:end].decode("latin-1").split("\r\n")[1:]
                fields = [line.partition(":") for line in lines]
                headers = {name.lower(): value.strip() for name, _, value in fields}
                size = end + 4 + int(headers["content-length"])
                if len(buffer) < size:
                    break
                answer = job.take(bytes(buffer[end + 4 : size]), headers)[1]
                del buffer[:size]
                connection.send(ANSWERS[next(iter(answer.values()))])
                close = close or headers.get("connection") == "close"
            if close:
                del connections[descriptor]
                connection.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
