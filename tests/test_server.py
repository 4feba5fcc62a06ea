"""The server at its limits: connections, descriptors, stalls and bursts."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

from tests.support import (
    DUPLICATE,
    HEALTH,
    OK,
    PROGRAM,
    Receiver,
    ServedTest,
    central_headers,
    config_of,
    deadline_poll,
    good,
    new_body,
    raw_request,
    resource,
    share_receiver,
)

setUpModule = share_receiver

HUGE = 300_000  # bytes: more than a pipe takes

NO_STDOUT = """#!/bin/sh
exec "$PYTHON" "$@" >&-
"""


class FaultCase(unittest.TestCase):
    """A log in a folder that outlives the receivers."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="faults-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.log = self.folder / "alerts.jsonl"

    def config(self, **webclient_info):
        return config_of(log_file=str(self.log), **webclient_info)

    def script(self, text):
        """Return the path of a shell script that starts the receiver."""
        path = self.folder / "start"
        path.write_text(text)
        path.chmod(0o700)
        return str(path)

    def logged_ids(self):
        """Return the delivery IDs in the log; fail if a line is not whole."""
        return [line["delivery_id"] for line in self.parse(self.log.read_bytes())]

    def parse(self, data):
        """Return the parsed lines, as a reader does: what is not JSON is a half line, passed
        over.
        """
        lines = []
        for line in data.split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def health(self, receiver):
        return receiver.request(HEALTH).status


RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection

FEW_DESCRIPTORS = """#!/bin/sh
ulimit -n 40
exec "$PYTHON" "$@"
"""

on_linux = unittest.skipUnless(sys.platform == "linux", "needs /proc")


def cpu_seconds(receiver):
    """Return the processor time that a receiver has used so far (proc(5): utime and stime)."""
    fields = Path(f"/proc/{receiver.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class MaxConnections(ServedTest):
    config = config_of(max_connections=4)

    def test_too_many_connections_wait_until_there_is_a_place(self):
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(self.receiver.connect()) for _ in range(4)]
            requests = [good() for _ in held]
            for connection, request in zip(held, requests):
                connection.send(request[:-1])
            waiting = [stack.enter_context(self.receiver.connect()) for _ in range(20)]
            for connection in waiting:
                connection.send(good())
            self.assertFalse(select.select([one.socket for one in waiting], [], [], 0.3)[0])
            for connection, request in zip(held, requests):  # they are served, and make room
                connection.send(request[-1:])
                self.assert_reply(connection.read(), 200)
            for connection in waiting:
                self.assert_reply(connection.read(), 200)

    def test_idle_connections_keep_nobody_waiting(self):
        with contextlib.ExitStack() as stack:
            for _ in range(12):
                connection = stack.enter_context(self.receiver.connect())
                connection.send(good())
                self.assert_reply(connection.read(), 200)


class Crowd(ServedTest):
    def test_three_hundred_connections_at_once_are_all_answered(self):
        def crowd():
            return [line for line in list(self.receiver.stdout_lines) if '"crowd"' in line]

        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(self.receiver.connect(30)) for _ in range(300)]
            for connection in connections:
                connection.send(good(new_body(crowd=True)))
            for connection in connections:
                self.assertEqual(connection.read().status, 200)
            for connection in connections[::10]:
                connection.send(good(new_body(crowd=True)))
                self.assertEqual(connection.read().status, 200)
        deadline_poll(lambda: len(crowd()) >= 330)
        numbers = {json.loads(line)["alert"]["number"] for line in crowd()}
        self.assertEqual((len(crowd()), len(numbers)), (330, 330))


class Stdout(FaultCase):
    """The reader of stdout."""

    def setUp(self):
        super().setUp()
        self.read_end, self.write_end = os.pipe()
        self.reader = open(self.read_end, "rb", buffering=0)
        self.addCleanup(self.reader.close)

    def receiver(self, **webclient_info):
        """Start a receiver whose stdout is a pipe that nobody reads yet."""
        found = Receiver(self.config(**webclient_info), stdout=self.write_end)
        os.close(self.write_end)
        return found

    def signed(self, **extra):
        body = new_body(**extra)
        return body, central_headers(body)

    def read_some(self, size):
        """Read once, at most `size` bytes; fail if there is nothing."""
        self.assertTrue(select.select([self.reader], [], [], 10)[0], "nothing comes on stdout")
        return os.read(self.read_end, size)

    def read_on(self):
        """Read stdout from now on in a thread; return the thread and the growing list of what it
        read.
        """
        parts = []

        def read():
            for part in iter(lambda: self.reader.read(65536), b""):
                parts.append(part)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread, parts

    def test_a_reader_that_is_gone_means_503_and_exit_1(self):
        body, headers = self.signed()
        with self.receiver() as receiver:
            self.assertEqual(receiver.deliver().json, OK)
            self.reader.close()
            with receiver.connect() as connection:
                connection.send(raw_request(headers=headers, body=body))
                self.assertEqual(connection.read().status, 503)
            self.assertEqual(receiver.wait(), 1)
            self.assertTrue(
                [line for line in receiver.stderr_lines if " ERROR " in line and "stdout" in line]
            )
            self.assertNotIn("Traceback", "\n".join(receiver.stderr_lines))
        self.assertEqual(len(self.logged_ids()), 1)
        with Receiver(self.config()) as receiver:
            self.assertEqual(receiver.post(body, headers).json, OK)
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
        self.assertEqual(len(self.logged_ids()), 2)

    def test_a_reader_that_goes_while_a_line_waits_for_it_means_503_and_exit_1(self):
        body, headers = self.signed(filler="x" * HUGE)
        with self.receiver() as receiver, receiver.connect() as connection:
            connection.send(raw_request(headers=headers, body=body))
            select.select([self.reader], [], [], 10)  # it is being written
            self.reader.close()
            self.assertEqual(connection.read().status, 503)
            connection.socket.close()
            self.assertEqual(receiver.wait(), 1)
        self.assertEqual(self.logged_ids(), [])

    def test_a_stalled_reader_means_503_for_all_until_it_reads_again(self):
        sent = [self.signed(filler="x" * HUGE)] + [self.signed() for _ in range(4)]
        with self.receiver(request_timeout_seconds=0.2) as receiver:
            self.assertEqual(self.health(receiver), 200)
            started = time.monotonic()
            self.assertEqual(receiver.post(*sent[0]).status, 503)  # half of its line is in the pipe
            self.assertGreater(time.monotonic() - started, 0.15)
            self.assertEqual(self.health(receiver), 503)
            statuses, started = [], time.monotonic()
            threads = [
                threading.Thread(target=lambda one=one: statuses.append(receiver.post(*one).status))
                for one in sent
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            self.assertEqual(statuses, [503] * len(sent))
            self.assertLess(time.monotonic() - started, 5, "they waited one after the other")
            self.assertEqual(self.health(receiver), 503)
            self.assertEqual(self.logged_ids(), [])
            receiver.wait_for_log(r" ERROR .*stdout")
            thread, shown = self.read_on()
            for one in sent:
                self.assertEqual(receiver.post(*one).json, OK)
                self.assertEqual(self.health(receiver), 200)
            for one in sent:
                self.assertEqual(receiver.post(*one).json, DUPLICATE)
            receiver.process.kill()
            thread.join(10)
        ids = [headers["X-Central-Delivery-ID"] for _, headers in sent]
        self.assertEqual(self.logged_ids(), ids)
        lines = self.parse(b"".join(shown))
        self.assertEqual(
            [line["delivery_id"] for line in lines][-len(ids) :], ids
        )  # the first may stand there twice
        self.assertLessEqual({line["delivery_id"] for line in lines}, set(ids))

    def test_a_half_line_that_a_stall_leaves_is_ended_before_the_next_one(self):
        sent = [self.signed(filler=letter * HUGE) for letter in "abc"]
        with self.receiver(request_timeout_seconds=0.1) as receiver:
            shown = b""
            for one in sent:  # each takes up some more of the pipe, or nothing at all
                self.assertEqual(receiver.post(*one).status, 503)
                self.assertEqual(receiver.post(*one).status, 503)
                shown += self.read_some(20_000)
            thread, rest = self.read_on()
            for one in sent:
                self.assertEqual(receiver.post(*one).json, OK)
            receiver.process.kill()
            thread.join(10)
        lines = self.parse(shown + b"".join(rest))
        self.assertEqual({line["delivery_id"] for line in lines}, set(self.logged_ids()))
        self.assertEqual(len(self.logged_ids()), len(sent))

    def test_a_stop_waits_for_a_delivery_that_waits_for_the_reader(self):
        body, headers = self.signed(filler="x" * HUGE)
        with self.receiver() as receiver, receiver.connect() as connection:
            connection.send(raw_request(headers=headers, body=body))
            select.select([self.reader], [], [], 10)
            receiver.process.send_signal(signal.SIGTERM)
            thread, shown = self.read_on()
            self.assertEqual(connection.read().json, OK)
            connection.socket.close()
            self.assertEqual(receiver.wait(), 0)
            thread.join(10)
        self.assertEqual(
            [line["alert"] for line in self.parse(b"".join(shown))], [json.loads(body)]
        )
        self.assertEqual(len(self.logged_ids()), 1)

    def test_a_slow_reader_is_no_stalled_one(self):
        body, headers = self.signed(filler="x" * HUGE)
        shown = b""
        with self.receiver(request_timeout_seconds=3) as receiver, receiver.connect() as connection:
            connection.send(raw_request(headers=headers, body=body))
            while not shown.endswith(b"\n"):
                shown += self.read_some(30_000)
                time.sleep(0.01)
            self.assertEqual(connection.read().json, OK)
        self.assertEqual([line["alert"] for line in self.parse(shown)], [json.loads(body)])

    def test_a_stdout_that_is_closed_from_the_start_ends_the_program_with_1(self):
        path = self.folder / "input_info.json"
        path.write_text(json.dumps(self.config()))
        path.chmod(0o600)
        command = [
            self.script(NO_STDOUT),
            str(PROGRAM),
            f"-i={path}",
        ]
        environment = {**os.environ, "PYTHON": sys.executable}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        try:
            said = process.communicate(timeout=5)[1].decode()
        finally:
            process.kill()
            process.communicate()
        self.assertEqual(process.returncode, 1)
        self.assertNotIn("Traceback", said)
        self.assertIn("stdout", said)

    @unittest.skipUnless(
        sys.platform == "linux" and os.geteuid() == 0, "needs to mount a small file system"
    )
    def test_a_file_as_stdout_on_a_full_disk_has_every_line_whole_in_the_end(self):
        disk = self.folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
        try:
            subprocess.run(mount, check=True, stderr=subprocess.PIPE)
        except (OSError, subprocess.CalledProcessError) as error:
            self.skipTest(f"no tmpfs can be mounted: {error}")
        self.addCleanup(subprocess.run, ["umount", "-l", str(disk)], check=False)
        ballast, output = disk / "ballast", disk / "stdout.jsonl"
        ballast.write_bytes(b"x" * (256 - 24) * 1024)
        sent, refused = [], []
        with open(output, "ab") as file:
            receiver = Receiver(self.config(), stdout=file)
        with receiver:
            while len(refused) < 3 and len(sent) < 100:
                sent.append(self.signed(filler="x" * 1500))
                status = receiver.post(*sent[-1]).status
                if status != 200:
                    self.assertEqual((status, self.health(receiver)), (503, 503))
                    refused.append(sent[-1])
            self.assertGreater(len(sent), len(refused))
            self.assertEqual(len(refused), 3)
            self.assertEqual(len(self.logged_ids()), len(sent) - len(refused))
            self.assertIsNone(receiver.process.poll())
            ballast.unlink()
            for one in refused:
                self.assertEqual(receiver.post(*one).json, OK)
                self.assertEqual(self.health(receiver), 200)
        self.assertEqual(
            sorted(self.logged_ids()),
            sorted(headers["X-Central-Delivery-ID"] for _, headers in sent),
        )
        shown = [line["delivery_id"] for line in self.parse(output.read_bytes())]
        self.assertEqual(set(shown), set(self.logged_ids()))


class Descriptors(FaultCase):
    """Connections that mean no good, and more of them than there is room for."""

    def descriptors(self, receiver):
        return len(os.listdir(f"/proc/{receiver.process.pid}/fd"))

    def cpu_seconds(self, receiver):
        fields = Path(f"/proc/{receiver.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def raise_descriptor_limit(self, wanted):
        """Let this process, and what it starts, open so many files; skip where that is not
        allowed.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        if hard != resource.RLIM_INFINITY and hard < wanted:
            self.skipTest(f"needs {wanted} descriptors, {hard} are allowed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))

    @on_linux
    def test_thousands_of_aborted_connections_leave_nothing_behind(self):
        body = new_body()
        whole = raw_request(headers=central_headers(body), body=body)
        head_end = whole.index(b"\r\n\r\n") + 4
        kinds = [
            ("nothing", b"", True),
            ("nothing, closed in order", b"", False),
            ("half a request line", whole[:10], True),
            ("half of the header", whole[: head_end // 2], True),
            ("half of the header, closed in order", whole[: head_end // 2], False),
            ("half of the body", whole[: head_end + 5], True),
            ("half of the body, closed in order", whole[: head_end + 5], False),
            ("a whole request, no wait for the answer", whole, True),
            ("many requests, no wait for the answers", whole * 20, True),
            ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", True),
        ]
        with Receiver(self.config(request_timeout_seconds=5)) as receiver:
            self.assertEqual(receiver.post(body, central_headers(body)).status, 200)
            before, end = self.descriptors(receiver), time.monotonic() + 40
            for _ in range(100 if os.environ.get("CI") else 20):  # a hundred connections each
                self.assertLess(time.monotonic(), end, "it accepts too slowly")
                opened = []
                for _, data, is_reset in kinds * 10:
                    connection = socket.create_connection(("127.0.0.1", receiver.port), timeout=10)
                    opened.append(connection)
                    if is_reset:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    connection.sendall(data)
                for connection in opened:
                    connection.close()
            deadline_poll(
                lambda: self.descriptors(receiver) <= before, message="descriptors are left open"
            )
            self.assertEqual(receiver.deliver().status, 200)
            self.assertEqual(self.health(receiver), 200)
            self.assertNotIn("Traceback", "\n".join(receiver.stderr_lines))
            self.assertNotIn("internal error", "\n".join(receiver.stderr_lines))
        self.assertEqual(len(self.logged_ids()), len(set(self.logged_ids())))

    @on_linux
    def test_running_out_of_descriptors_is_survived_at_rest_and_over_soon(self):
        body = new_body()
        environment = {"PYTHON": sys.executable}
        python = self.script(FEW_DESCRIPTORS)
        with Receiver(self.config(), python=[python], environment=environment) as receiver:
            with receiver.connect() as steady:
                steady.send(raw_request(headers=central_headers(body), body=body))
                self.assertEqual(steady.read().status, 200)
                idle = [
                    socket.create_connection(("127.0.0.1", receiver.port), timeout=10)
                    for _ in range(60)
                ]
                try:
                    deadline_poll(
                        lambda: self.descriptors(receiver) >= 40,
                        message="there were enough descriptors",
                    )
                    started, before = self.cpu_seconds(receiver), time.monotonic()
                    start = len(receiver.stderr_lines)
                    receiver.process.send_signal(
                        signal.SIGHUP
                    )  # nothing can be read now: the old configuration stays
                    receiver.wait_for_log(r" ERROR .*reload", start=start)
                    time.sleep(max(0.0, 0.4 - (time.monotonic() - before)))
                    self.assertLess(self.cpu_seconds(receiver) - started, 0.17, "it spins")
                    self.assertIsNone(receiver.process.poll())
                    body = new_body()
                    steady.send(raw_request(headers=central_headers(body), body=body))
                    self.assertEqual(steady.read().json, OK)
                finally:
                    for connection in idle:
                        connection.close()
            self.assertEqual(receiver.deliver().status, 200)
            self.assertEqual(self.health(receiver), 200)
            self.assertLess(len(receiver.stderr_lines), 60, "it floods the log")
        self.assertEqual(len(self.logged_ids()), 3)

    def test_room_for_connections_is_free_again_when_they_end(self):
        with Receiver(self.config(max_connections=3)) as receiver:
            held = [receiver.connect() for _ in range(3)]
            for connection in held:
                self.addCleanup(connection.socket.close)
                connection.send(HEALTH)
                self.assertEqual(connection.read().status, 200)
            for number, connection in enumerate(held):
                with self.subTest(closed=number + 1):
                    connection.socket.close()
                    self.assertEqual(receiver.deliver().status, 200)
        self.assertEqual(len(self.logged_ids()), 3)

    def test_room_that_silent_and_dripping_senders_take_is_free_again_in_time(self):
        body = new_body()
        half = raw_request(headers=central_headers(body), body=body)[:-1]
        with Receiver(self.config(max_connections=4, request_timeout_seconds=0.3)) as receiver:
            held = [receiver.connect() for _ in range(4)]
            for connection, data in zip(held, (b"", half[:30], half, b"")):
                self.addCleanup(connection.socket.close)
                connection.send(data)
            self.assertEqual(receiver.deliver().status, 200)

    @unittest.skipIf(resource is None, "needs many descriptors")
    def test_a_thousand_simultaneous_connections_all_get_an_answer(self):
        self.raise_descriptor_limit(4096)

        async def deliver(port):
            """Return the delivery's ID and the status that it got."""
            body = new_body()
            headers = central_headers(body)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(raw_request(headers=headers, body=body))
                answer = await reader.readuntil(b"}")
                return headers["X-Central-Delivery-ID"], int(answer.split()[1])
            finally:
                writer.close()

        async def deliver_all(port):
            return await asyncio.wait_for(asyncio.gather(*(deliver(port) for _ in range(1000))), 15)

        with Receiver(self.config()) as receiver:
            answers = asyncio.run(deliver_all(receiver.port))
            self.assertEqual({status for _, status in answers} - {200, 503}, set())
            accepted = {delivery_id for delivery_id, status in answers if status == 200}
            self.assertGreaterEqual(len(accepted), 256)  # max_connections
            self.assertEqual(set(self.logged_ids()), accepted)
            deadline_poll(lambda: receiver.deliver().status == 200, message="it does not recover")
            self.assertEqual(len(self.logged_ids()), len(accepted) + 1)

    def test_dripping_senders_delay_nobody(self):
        body = new_body()
        data = raw_request(headers=central_headers(body), body=body)
        with Receiver(self.config(request_timeout_seconds=0.4)) as receiver:
            dripping = [receiver.connect() for _ in range(50)]
            for connection in dripping:
                self.addCleanup(connection.socket.close)
            slowest = 0.0
            for position in range(10):
                for connection in dripping:
                    connection.send(data[position : position + 1])
                started = time.monotonic()
                self.assertEqual(receiver.deliver().status, 200)
                slowest = max(slowest, time.monotonic() - started)
            self.assertLess(slowest, 1)
            for connection in dripping:
                self.assertEqual(connection.read().status, 408)


class Terminals(unittest.TestCase):
    def test_readers_that_stall_hold_up_neither_others_nor_a_stop(self):
        receivers = []
        for begin in (self.with_stalled_stderr, self.with_stalled_terminal):
            receivers.append(begin())
            receivers[
                -1
            ].process.terminate()  # a stop waits a while for its reader, meanwhile the other stalls
        for receiver in receivers:
            self.assertEqual(receiver.wait(), 0)

    def with_stalled_stderr(self):
        """Deliver to a receiver whose stderr nobody reads until its pipe is more than full; return
        it.
        """
        read_end, write_end = os.pipe()
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
        receiver = Receiver(arguments=["--verbose"], stdout=subprocess.DEVNULL, stderr=write_end)
        os.close(write_end)
        self.addCleanup(receiver.__exit__)
        reader = open(read_end, "rb", buffering=0)
        self.addCleanup(reader.close)
        line = reader.readline()  # it has started; from here on nobody reads
        receiver.port = int(re.search(rb"listens on \S+ port (\d+)", line)[1])
        for _ in range(
            150 if hasattr(fcntl, "F_SETPIPE_SZ") else 1500
        ):  # a line of 50 characters each
            self.assertEqual(receiver.deliver().json, OK)
        return receiver

    def with_stalled_terminal(self):
        """Deliver to a receiver whose stdout is a terminal until that stalls, which means 503;
        return it.
        """
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        self.addCleanup(os.close, slave)
        receiver = Receiver(config_of(request_timeout_seconds=0.2), stdout=slave).__enter__()
        self.addCleanup(receiver.__exit__)
        statuses, started = set(), time.monotonic()
        while 503 not in statuses and time.monotonic() - started < 20:
            statuses.add(receiver.deliver(new_body(filler="x" * 3000)).status)
        self.assertEqual(statuses, {200, 503})
        self.assertEqual(receiver.deliver().status, 503)
        return receiver


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
            first.send(good(new_body(filler="x" * (1 << 19))))  # more than a pipe holds
            deadline_poll(lambda: not select.select([], [writing], [], 0)[1])  # the pipe is full
            connections = [receiver.connect() for _ in range(20)]
            for number, connection in enumerate(connections):
                connection.send(good() + b"GET /health HTTP/1.1\r\n" * (number % 2))
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
        """Send `data` again and again on one connection, read the answers, and see that others are
        served.
        """
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
                        delivering.send(good())
                        for other in (asking, delivering):
                            self.assertEqual(other.read().status, 200)
            finally:
                stopped.set()
                connection.socket.shutdown(socket.SHUT_RDWR)
                for thread in threads:
                    thread.join(10)

    def test_a_sender_that_never_pauses_holds_up_nobody(self):
        forged = raw_request(headers=central_headers(b"{}", token="another"), body=b"{}")
        kinds = {"forged": forged * 500, "repeated": good() * 500, "asked": HEALTH * 500}
        kinds["nothing"] = b"\r\n" * 100_000
        for kind, data in kinds.items():
            with self.subTest(kind):
                self.flood(data)

    def test_bodies_in_chunks_of_one_byte_hold_up_nobody(self):
        head = raw_request(headers={"Transfer-Encoding": "chunked"}, length=False)
        self.flood(head + b"1\r\nx\r\n" * 1_000_000 + b"0\r\n\r\n")
