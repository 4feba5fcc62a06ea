"""The server under load: time limits, stalls, bursts, floods, few descriptors, a small stack."""

from __future__ import annotations

import base64
import contextlib
import os
import select
import socket
import sys
import threading
import time
import unittest

import central_webhook_client as product
from tests.support import (
    HEALTH,
    METRICS,
    OK,
    PATH,
    RESET,
    TOKEN,
    LogTest,
    Receiver,
    ReceiverTest,
    central_headers,
    config_of,
    deadline_poll,
    hook,
    ids_of,
    raw_request,
    signed,
    signed_request,
)

try:
    import resource
except ImportError:  # Windows
    resource = None

on_linux = unittest.skipUnless(sys.platform == "linux", "needs /proc")
has_limits = unittest.skipIf(resource is None, "needs to set limits")
CHUNKED = raw_request(headers={"Transfer-Encoding": "chunked"}, length=False)


class ServerTest(ReceiverTest):
    def connections(self, count, timeout=10.0):
        """Open connections that the end of the test closes."""
        found = [self.receiver.connect(timeout) for _ in range(count)]
        for connection in found:
            self.addCleanup(connection.socket.close)
        return found


class Deadlines(ServerTest):
    LIMIT = 0.4  # seconds
    config = config_of(request_timeout_seconds=LIMIT)

    def assert_times_out(self, connection, begin):
        """Read the 408 that is due `LIMIT` after `begin`."""
        self.assertEqual(connection.read().status, 408)
        self.assertGreater(time.monotonic() - begin, self.LIMIT * 0.8)
        self.assertLess(time.monotonic() - begin, self.LIMIT + 5)
        self.assertTrue(connection.is_closed())

    def test_an_incomplete_request_is_refused_after_the_deadline(self):
        body = b'{"a":1}'
        request = signed_request(body)
        expect = raw_request(headers={"Expect": "100-continue"}, body=body)[: -len(body)]
        table = {
            "nothing": b"",
            "a few bytes": b"POS",
            "half the header": request[:100],
            "no body": request[: -len(body)],
            "half the body": request[:-3],
            "half a chunk": CHUNKED + b"5\r\n12",
            "no last chunk": CHUNKED + b"5\r\n12345\r\n",
            "no end of the trailers": CHUNKED + b"5\r\n12345\r\n0\r\n",
            "no body after 100": expect,
        }
        begin, opened = time.monotonic(), self.connections(len(table))
        for connection, data in zip(opened, table.values()):
            connection.send(data)
        self.assertEqual(opened[-1].read().status, 100)
        for what, connection in zip(table, opened):
            with self.subTest(what):
                self.assert_times_out(connection, begin)

    def test_a_sender_that_drips_does_not_outlive_the_deadline(self):
        body = bytes(200)
        request = signed_request(body)
        table = {  # what is sent at once, and what drips
            "header": (b"", request),
            "body": (request[: -len(body)], body),
            "chunk": (CHUNKED + b"c8\r\n", body),
        }
        begin, opened = time.monotonic(), self.connections(len(table))
        for connection, (data, _) in zip(opened, table.values()):
            connection.send(data)
        stopped = threading.Event()

        def drip():
            for number in range(200):
                for connection, (_, rest) in zip(opened, table.values()):
                    with contextlib.suppress(OSError):
                        connection.send(rest[number : number + 1])
                if stopped.wait(0.02):
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(stopped.set)
        for what, connection in zip(table, opened):
            with self.subTest(what):
                self.assertEqual(connection.read().status, 408)
                self.assertLess(time.monotonic() - begin, self.LIMIT + 2)

    def test_a_kept_connection_may_rest_longer_than_a_request_takes(self):
        ends = {b"": b"", b"\r\n": b"", b"\r\n\r\n": b"", b"\r": b"\n"}
        opened = []
        for end in ends:  # a line end does not begin a request
            opened += self.connections(1)
            opened[-1].send(signed_request() + end)
            self.assertEqual(opened[-1].read().status, 200)
        sockets = [connection.socket for connection in opened]
        self.assertEqual(select.select(sockets, [], [], self.LIMIT * 1.5)[0], [])
        for connection, (end, rest) in zip(opened, ends.items()):
            with self.subTest(end):
                request = signed_request()
                connection.send(rest + request[:20])
                connection.send(request[20:])
                self.assertEqual(connection.read().status, 200)
        begin = time.monotonic()
        opened[0].send(request[:20])
        self.assert_times_out(opened[0], begin)

    def test_dripping_senders_delay_no_other_sender(self):
        request = signed_request()
        with Receiver(config_of(request_timeout_seconds=0.6)) as receiver:
            dripping = [receiver.connect() for _ in range(50)]
            for position in range(10):
                for connection in dripping:
                    connection.send(request[position : position + 1])
                started = time.monotonic()
                self.assertEqual(receiver.deliver().status, 200)
                self.assertLess(time.monotonic() - started, 2)
            for connection in dripping:
                self.assertEqual(connection.read().status, 408)
                connection.socket.close()


class FewConnections(ServerTest):
    config = config_of(max_connections=4)

    def test_surplus_connections_wait_until_there_is_room(self):
        requests = [signed_request() for _ in range(4)]
        held = self.connections(len(requests))
        for connection, request in zip(held, requests):
            connection.send(request[:-1])
        waiting = self.connections(20)
        for connection in waiting:
            connection.send(signed_request())
        sockets = [connection.socket for connection in waiting]
        self.assertEqual(select.select(sockets, [], [], 0.2)[0], [])
        for connection, request in zip(held, requests):
            connection.send(request[-1:])
        for connection in (*held, *waiting):
            self.assertEqual(connection.read().status, 200)

    def test_idle_connections_keep_no_sender_waiting(self):
        for connection in self.connections(12):
            connection.send(signed_request())
            self.assertEqual(connection.read().status, 200)

    def test_connections_that_end_make_room(self):
        for connection in self.connections(12):
            connection.send(HEALTH)
            connection.read()
            connection.socket.close()
        self.assertEqual(self.receiver.deliver().status, 200)

    def test_silent_and_unfinished_connections_make_room_after_their_deadline(self):
        request = signed_request()
        config = config_of(max_connections=4, request_timeout_seconds=0.3)
        with Receiver(config) as receiver, contextlib.ExitStack() as stack:
            for data in (b"", request[:30], request[:-1], b""):
                stack.enter_context(receiver.connect()).send(data)
            self.assertEqual(receiver.deliver().status, 200)


class Bursts(LogTest):
    def test_a_thousand_connections_at_once_are_all_answered(self):
        count = 1000
        if resource:  # each needs a descriptor here, and perhaps one in the receiver
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            wanted = 2048 if hard == resource.RLIM_INFINITY else min(2048, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            count = min(count, wanted - 100)
        with self.started() as receiver, contextlib.ExitStack() as stack:
            opened = [stack.enter_context(receiver.connect(30)) for _ in range(count)]
            for connection in opened:
                connection.send(signed_request())
            for connection in opened:
                self.assertEqual(connection.read().status, 200)
        self.assertEqual(len(set(ids_of(self.read_log()))), count)

    @on_linux
    def test_thousands_of_aborted_connections_leave_nothing_behind(self):
        body, headers = signed()
        whole = raw_request(headers=headers, body=body)
        head_end = whole.index(b"\r\n\r\n") + 4
        tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n"
        pieces = [b"", whole[:10], whole[: head_end // 2], whole[: head_end + 5]]
        pieces += [whole, whole * 20, tls]
        with self.started(request_timeout_seconds=5) as receiver:
            descriptors = f"/proc/{receiver.process.pid}/fd"
            self.assertEqual(receiver.post(body, headers).status, 200)
            before = len(os.listdir(descriptors))
            for _ in range(10 if os.environ.get("CI") else 1):  # a thousand each
                opened = []
                for number in range(1000):
                    connection = socket.create_connection(("127.0.0.1", receiver.port), 10)
                    if number % 3:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    connection.sendall(pieces[number % len(pieces)])
                    opened.append(connection)
                    if len(opened) == 100:
                        for connection in opened:
                            connection.close()
                        opened = []
            deadline_poll(lambda: len(os.listdir(descriptors)) <= before, 20)
            self.assertEqual(receiver.deliver().status, 200)
            self.assertEqual(receiver.health(), 200)
            self.assertNotRegex("\n".join(receiver.stderr_lines), "Traceback|internal error")
        ids = ids_of(self.read_log())
        self.assertEqual(len(ids), len(set(ids)))


class FewDescriptors(LogTest):
    @on_linux
    def test_running_out_of_descriptors_is_survived_without_spinning(self):
        python, environment = self.script('ulimit -n 40\nexec "$PYTHON" "$@"'), sys.executable
        with (
            Receiver(
                self.config(), python=[python], environment={"PYTHON": environment}
            ) as receiver,
            receiver.connect() as steady,
        ):
            steady.send(signed_request())
            self.assertEqual(steady.read().status, 200)
            idle = [receiver.connect() for _ in range(60)]
            descriptors = f"/proc/{receiver.process.pid}/fd"
            deadline_poll(lambda: len(os.listdir(descriptors)) >= 40)
            used, begin = receiver.cpu_seconds(), time.monotonic()
            receiver.reload(pattern=" ERROR .*reload")  # no file can be opened now
            time.sleep(max(0.0, 0.4 - (time.monotonic() - begin)))
            self.assertLess(receiver.cpu_seconds() - used, 0.17, "it spins")
            steady.send(signed_request())
            self.assertEqual(steady.read().json, OK)
            for connection in idle:
                connection.socket.close()
            self.assertEqual(receiver.deliver().status, 200)
            self.assertEqual(receiver.health(), 200)
            self.assertLess(len(receiver.stderr_lines), 60, "it floods the log")
        self.assertEqual(len(self.read_log()), 3)


class Floods(ServerTest):
    """Senders that never pause, and senders that read no answers."""

    config = config_of(request_timeout_seconds=2)

    def flood(self, data):
        """Send `data` again and again on one connection; meanwhile others must be served."""
        (connection,) = self.connections(1)
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
            for _ in range(15):
                self.assertEqual(self.receiver.health(), 200)
                self.assertEqual(self.receiver.deliver().status, 200)
        finally:
            stopped.set()
            connection.socket.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)

    def test_a_sender_that_never_pauses_delays_no_other_sender(self):
        forged = raw_request(headers=central_headers(b"{}", token="another"), body=b"{}")
        for what, data in {
            "forged": forged * 500,
            "duplicates": signed_request() * 500,
            "health": HEALTH * 500,
            "empty lines": b"\r\n" * 100_000,
            "chunks of one byte": CHUNKED + b"1\r\nx\r\n" * 1_000_000 + b"0\r\n\r\n",
        }.items():
            with self.subTest(what):
                self.flood(data)

    def test_senders_that_read_no_answers_delay_no_other_sender(self):
        deaf = self.connections(3)
        for connection in deaf:
            connection.socket.setblocking(False)
        sent = 1
        while sent:  # until neither side has room for more
            sent = 0
            for connection in deaf:
                with contextlib.suppress(OSError):
                    sent += connection.socket.send(METRICS * 2000)
            self.assertEqual(self.receiver.deliver().status, 200)
        self.assertEqual(self.receiver.health(), 200)

    def test_header_fields_of_any_size_are_parsed_in_linear_time(self):
        """Far above the limit of size, so that anything else would take minutes."""
        for shape in (b"X:%b\0", b"X:%b\r", b"X: a%b\0", b"%b\0:", b"X%b\n", b"X: \t%b\x7f"):
            for piece in (b" ", b"\t", b" a", b"a", b"a:", b"a: "):
                with self.subTest(shape=shape, piece=piece):
                    with self.assertRaises(product.Refusal):
                        product.parse_fields([shape % (piece * 500_000)])


@has_limits
class SmallStack(ServerTest):
    """Parsers of JSON recurse; a thread's stack must not depend on `ulimit -s`."""

    DEEP = b"[" * 20_000

    @classmethod
    def setUpClass(cls):
        unreachable = "http://127.0.0.1:9/.well-known/openid-configuration"
        oidc = {"well_known_url": unreachable, "audience": "a"}
        webhooks = [{"name": "noc", "path": PATH, "token": TOKEN}, hook("oidc", oidc=oidc)]
        python = ["sh", "-c", 'ulimit -s 256; exec "$0" "$@"', sys.executable, "-S"]
        cls.receiver = Receiver(config_of(webhook=webhooks), python=python).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def test_deep_nesting_gets_an_answer(self):
        deep = base64.urlsafe_b64encode(self.DEEP).decode().rstrip("=")
        header = base64.urlsafe_b64encode(b'{"alg":"RS256","kid":"a"}').decode().rstrip("=")
        for access_token in (f"{deep}.e30.AAAA", f"{header}.{deep}.AAAA", f"{deep}.{deep}."):
            body, headers = signed()
            headers["Authorization"] = f"Bearer {access_token}"
            self.assertIn(self.receiver.post(body, headers, "/oidc").status, (401, 503))
        for body in (self.DEEP, self.DEEP + b"]" * 20_000, b'{"a":' * 20_000):
            self.assertEqual(self.receiver.deliver(body).status, 200)
            self.assertEqual(self.receiver.post(body, {}).status, 401)
