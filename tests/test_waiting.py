"""Nobody waits for another: own code that takes long, readers that stall, senders that read no answers."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
import unittest
from pathlib import Path

import central_webhook_client as product
from tests.support import (
    PATH,
    Receiver,
    central_headers,
    config_of,
    deadline_poll,
    new_body,
    raw_request,
)

HEALTH = raw_request("GET", "/health", length=False)


def signed_request(**extra):
    """Return a delivery as it goes over the wire."""
    body = new_body(**extra)
    return raw_request(headers=central_headers(body), body=body)


def cpu_seconds(receiver):
    """Return the processor time that a receiver has used so far (proc(5): utime and stime)."""
    fields = Path(f"/proc/{receiver.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Stalls(unittest.TestCase):
    def wait_for_requests_in_flight(self, receiver, count):
        expected = b"in_flight %d\n" % (count + 1)  # the question is one of them
        deadline_poll(
            lambda: expected in receiver.request(HEALTH.replace(b"health", b"metrics")).body
        )

    @unittest.skipUnless(os.path.exists("/proc/self/stat"), "needs /proc")
    def test_while_the_reader_of_stdout_stalls_senders_that_go_on_or_go_away_cost_nothing(self):
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        self.addCleanup(os.close, writing)
        with Receiver(config_of(request_timeout_seconds=0.8), stdout=writing) as receiver:
            first = receiver.connect()
            first.send(signed_request(filler="x" * (1 << 19)))  # more than a pipe holds
            deadline_poll(lambda: not select.select([], [writing], [], 0)[1])  # the pipe is full
            connections = [receiver.connect() for _ in range(20)]
            for number, connection in enumerate(connections):
                connection.send(signed_request() + b"GET /health HTTP/1.1\r\n" * (number % 2))
            for number, connection in enumerate(connections):
                if number % 3 == 0:
                    connection.socket.shutdown(socket.SHUT_WR)
            self.wait_for_requests_in_flight(receiver, 21)
            before, started = cpu_seconds(receiver), time.monotonic()
            self.assertEqual(first.read().status, 503)
            self.assertLess(cpu_seconds(receiver) - before, (time.monotonic() - started) / 4 + 0.1)
            for connection in connections:
                self.assertEqual(connection.read().status, 503)
            for connection in [first, *connections]:
                connection.socket.close()

    def test_senders_that_read_no_answers_hold_up_nobody(self):
        with Receiver(config_of(request_timeout_seconds=1)) as receiver:
            deaf = [receiver.connect() for _ in range(3)]
            for connection in deaf:
                connection.socket.setblocking(False)
            asked = raw_request("GET", "/metrics", length=False) * 2000
            sent = 1
            while sent:  # until neither side has room for more
                sent = 0
                for connection in deaf:
                    try:
                        sent += connection.socket.send(asked)
                    except OSError:
                        pass
                self.assertEqual(receiver.deliver().status, 200)
            self.assertEqual(receiver.request(HEALTH).status, 200)
            for connection in deaf:
                connection.socket.close()


class Floods(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.receiver = Receiver().__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def flood(self, data):
        """Send `data` again and again on one connection, read the answers, and see that others are served."""
        receiver = self.receiver
        with receiver.connect() as connection:
            stopped = threading.Event()

            def write():
                with contextlib.suppress(OSError):
                    while not stopped.is_set():
                        connection.send(data)

            def read():
                with contextlib.suppress(OSError):
                    while connection.socket.recv(1 << 16):
                        pass

            threads = [threading.Thread(target=write), threading.Thread(target=read)]
            for thread in threads:
                thread.start()
            try:
                for _ in range(10):
                    with (
                        receiver.connect(timeout=2) as asking,
                        receiver.connect(timeout=2) as delivering,
                    ):
                        asking.send(HEALTH)
                        delivering.send(signed_request())
                        for other in (asking, delivering):
                            self.assertEqual(other.read().status, 200)
            finally:
                stopped.set()
                connection.socket.shutdown(socket.SHUT_RDWR)
                for thread in threads:
                    thread.join(10)

    def test_a_sender_that_never_pauses_holds_up_nobody(self):
        forged = raw_request(headers=central_headers(b"{}", token="another"), body=b"{}")
        kinds = {"forged": forged * 500, "repeated": signed_request() * 500, "asked": HEALTH * 500}
        kinds["nothing"] = b"\r\n" * 100_000
        for kind, data in kinds.items():
            with self.subTest(kind):
                self.flood(data)

    def test_bodies_in_chunks_of_one_byte_hold_up_nobody(self):
        head = raw_request(headers={"Transfer-Encoding": "chunked"}, length=False)
        self.flood(head + b"1\r\nx\r\n" * 1_000_000 + b"0\r\n\r\n")


class Hostile(unittest.TestCase):
    """Far above every limit of size, so that anything but linear time takes for ever."""

    def test_header_fields_are_read_in_linear_time(self):
        for shape in (b"X:%b\0", b"X:%b\r", b"X: a%b\0", b"%b\0:", b"X%b\n", b"X: \t%b\x7f"):
            for piece in (b" ", b"\t", b" a", b"a", b"a:", b"a: "):
                with self.subTest(shape=shape, piece=piece):
                    with self.assertRaises(product.Refusal):
                        product.parse_fields(shape % (piece * 500_000) + b"\r\n")

    def test_signatures_are_bounded_before_they_are_parsed(self):
        url = product.parse_public_url("https://www.example.com/hook")
        for given, signature in (
            ("a=(" + "b " * 5000 + ")", "a=:AAAA:"),
            ("a=()", "a=:AAAA:" + ";b" * 5000),
        ):
            headers = {"signature-input": given, "signature": signature}
            request = product.Request("POST", "/hook", None, "HTTP/1.1", headers, frozenset())
            with self.assertRaisesRegex(product.SignatureError, "above"):
                product.verify_message_signature(request, ["token"], url, 0)


class LineEnds(unittest.TestCase):
    def test_a_line_end_after_a_request_is_no_request(self):
        with Receiver(config_of(request_timeout_seconds=0.2)) as receiver:
            ends = {
                b"\r\n": b"",
                b"\r\n\r\n": b"",
                b"\r": b"\n",
            }  # and what goes before the next request
            with contextlib.ExitStack() as stack:
                connections = [stack.enter_context(receiver.connect()) for _ in ends]
                for connection, end in zip(connections, ends):
                    connection.send(signed_request() + end)
                    self.assertEqual(connection.read().status, 200)
                time.sleep(0.4)  # more than a request may take
                for connection, (end, rest) in zip(connections, ends.items()):
                    with self.subTest(end):
                        connection.send(rest + signed_request())
                        self.assertEqual(connection.read().status, 200)
            self.assertEqual(receiver.post(new_body(), {}, PATH).status, 401)
            receiver.wait_for_log("WARNING")
            self.assertEqual(sum("WARNING" in line for line in receiver.stderr_lines), 1)


if __name__ == "__main__":
    unittest.main()
