"""What the tests share: a receiver as a real process on a free port, signing, raw HTTP."""

from __future__ import annotations

import atexit
import base64
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import hmac
import json
import os
import py_compile
import re
import select
import shutil
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

TOP = Path(__file__).resolve().parent.parent
PROGRAM = TOP / "central_webhook_client.py"
TOKEN = "webhook-secret-token"
PATH = "/centralwebhook"
OK, DUPLICATE = {"status": "ok"}, {"status": "duplicate"}
# Control characters but for line feed, bidi controls, other separators of lines, zero width.
HARMFUL = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection


def deadline_poll(condition, seconds=10.0, message="it did not happen in time"):
    """Return the first true value of `condition()`; fail after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.002)
    raise AssertionError(message)


def in_parallel(function, arguments):
    """Call a function with each argument, all at the same time; return the results in order."""
    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))


def config_of(port=0, webhook=None, **webclient_info):
    """Return a configuration as a dict: one classic webhook unless `webhook` says otherwise."""
    if webhook is None:
        webhook = {"name": "noc", "path": PATH, "token": TOKEN}
    return {
        "webclient_info": {"host": "127.0.0.1", "port": port, **webclient_info},
        "central_info": {"webhook": webhook},
    }


def hook(name, **more):
    """Return a classic webhook whose path is its name."""
    return {"name": name, "path": f"/{name}", "token": TOKEN, **more}


def now_stamp(offset_seconds=0.0):
    """Return an ISO 8601 time stamp in UTC, `offset_seconds` from now."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + offset_seconds))


_counter = iter(range(1, 10**9))


def new_body(**extra):
    """Return a JSON body that is different every time."""
    payload = {
        "alert_type": "AP disconnected",
        "number": next(_counter),
        "severity": "Major",
        **extra,
    }
    return json.dumps(payload).encode()


def hmac_sha256(token, *parts):
    """Return the digest of the parts, one after the other."""
    return hmac.new(token.encode(), b"".join(parts), hashlib.sha256).digest()


def central_headers(body, token=TOKEN, service="Alerts", delivery_id=None, timestamp=None):
    """Sign a body as classic Central does; return its headers in the sender's spelling."""
    delivery_id = delivery_id or f"72d3162e-cc78-11e3-81ab-{next(_counter):012d}"
    timestamp = timestamp if timestamp is not None else now_stamp()
    signed = (service + delivery_id + timestamp).encode("latin-1")
    digest = hmac_sha256(token, body, signed)
    return {
        "Content-Type": "application/json",
        "X-Central-Service": service,
        "X-Central-Event": "Radio-Channel-Utilization",
        "X-Central-Delivery-ID": delivery_id,
        "X-Central-Delivery-Timestamp": timestamp,
        "X-Central-Customer-ID": "0123456789",
        "X-Central-Signature": base64.b64encode(digest).decode(),
    }


def raw_request(
    method="POST",
    path=PATH,
    headers=None,
    body=b"",
    version="HTTP/1.1",
    length=True,
    host="localhost",
):
    """Return a request as bytes; `headers` is a dict or a list of pairs."""
    pairs = list(headers.items()) if isinstance(headers, dict) else list(headers or [])
    if host is not None:
        pairs.insert(0, ("Host", host))
    if length:
        pairs.append(("Content-Length", str(len(body))))
    lines = [f"{method} {path} {version}", *(f"{name}: {value}" for name, value in pairs), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


HEALTH = raw_request("GET", "/health", length=False)
METRICS = raw_request("GET", "/metrics", length=False)


def signed(**extra):
    """Return a new body and its headers."""
    body = new_body(**extra)
    return body, central_headers(body)


def signed_request(body=None, **request):
    """Return a delivery as it goes over the wire, one that gets 200 unless `request` changes it."""
    body = new_body() if body is None else body
    return raw_request(headers=central_headers(body), body=body, **request)


def parse_lines(data):
    """Parse JSON Lines as a reader does: what is not JSON is a half line, and passed over."""
    found = []
    for line in data.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def ids_of(lines):
    """Return the delivery IDs of parsed lines."""
    return [line["delivery_id"] for line in lines]


def is_refused(port):
    """Return True if a port of this machine is not listened on."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class Answer:
    """One HTTP response: status, headers in lower case, body."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)


class Connection:
    """A raw TCP connection that sends bytes as they are and reads whole responses."""

    def __init__(self, port, timeout=10.0):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def _more(self):
        data = self.socket.recv(65536)
        if not data:
            raise EOFError("the connection was closed, with this still unread: %r" % self.buffer)
        self.buffer += data

    def read(self, head_only=False):
        """Read one response, an interim one (100) too."""
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        headers = {
            line.split(":", 1)[0].lower(): line.split(":", 1)[1].strip() for line in lines[1:]
        }
        length = 0 if head_only or status == 100 else int(headers["content-length"])
        while len(self.buffer) < length:
            self._more()
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return Answer(status, headers, body)

    def is_closed(self):
        """Wait for the end of the stream; False if anything else comes, or nothing in time."""
        try:
            return not self.buffer and self.socket.recv(1) == b""
        except ConnectionError:
            return True
        except socket.timeout:
            return False


@functools.lru_cache(maxsize=None)
def compiled_program():
    """Return a copy of the program as bytecode, since to compile it would be a third of each start.

    It keeps its name: Python knows bytecode by the first bytes of a file.
    """
    folder = tempfile.mkdtemp(prefix="program-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return py_compile.compile(str(PROGRAM), str(Path(folder, PROGRAM.name)), doraise=True)


class Receiver:
    """A running receiver: its process, port, and what it printed so far.

    The constructor starts the process, and `with` waits until it listens. Python's -S: nothing but
    the standard library, and nothing that this machine loads into every Python.
    """

    def __init__(
        self,
        config=None,
        arguments=(),
        environment=None,
        python=(sys.executable, "-S"),
        program=None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **popen,
    ):
        self.folder = Path(tempfile.mkdtemp(prefix="receiver-"))
        self.config_path = self.folder / "input_info.json"
        self.write_config(config if config is not None else config_of())
        self.stdout_lines, self.stderr_lines = [], []
        self.process = subprocess.Popen(
            [*python, str(program or compiled_program()), f"-i={self.config_path}", *arguments],
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **(environment or {})},
            **{"cwd": self.folder, **popen},
        )
        pipes = ((self.process.stderr, self.stderr_lines), (self.process.stdout, self.stdout_lines))
        self._threads = [self._collect(stream, lines) for stream, lines in pipes if stream]
        self.port = None

    @staticmethod
    def _collect(stream, lines):
        def run():
            for line in stream:
                lines.append(line.decode(errors="backslashreplace").rstrip("\n"))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def write_config(self, config):
        self.config_path.write_text(config if isinstance(config, str) else json.dumps(config))
        self.config_path.chmod(0o600)

    def __enter__(self):
        try:
            line = self.wait_for_log(r"listens on ")
            self.port = int(re.search(r"listens on \S+ port (\d+)", line)[1])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_for_log(self, pattern, seconds=10.0, start=0):
        """Return the first line on stderr from index `start` on that matches."""

        def find():
            for line in list(self.stderr_lines)[start:]:
                if re.search(pattern, line):
                    return line
            if self.process.poll() is not None and not self._threads[0].is_alive():
                raise AssertionError(f"ended with {self.process.returncode}: {self.stderr_lines}")
            return None

        return deadline_poll(find, seconds, f"no line {pattern!r} in the log")

    def wait_for_stdout(self, count, seconds=10.0):
        """Return the lines on stdout as soon as there are `count`."""
        deadline_poll(
            lambda: len(self.stdout_lines) >= count, seconds, f"fewer than {count} lines on stdout"
        )
        return list(self.stdout_lines)

    def connect(self, timeout=10.0):
        return Connection(self.port, timeout)

    def request(self, data, timeout=10.0):
        """Send raw bytes on a new connection; return the answer."""
        with self.connect(timeout) as connection:
            connection.send(data)
            return connection.read()

    def post(self, body, headers, path=PATH):
        return self.request(raw_request("POST", path, headers, body))

    def deliver(self, body=None, **signing):
        """Send a signed classic delivery; return the answer."""
        body = new_body() if body is None else body
        return self.post(body, central_headers(body, **signing))

    def health(self):
        """Return the status of /health."""
        return self.request(HEALTH).status

    def metrics(self):
        """Return {sample with its labels: value} of /metrics."""
        lines = self.request(METRICS).body.decode("ascii").splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line[:1] not in ("", "#")]
        assert len(dict(pairs)) == len(pairs), "a series occurs twice"
        return {name: float(value) for name, value in pairs}

    def in_flight(self):
        """Return how many requests are in flight, the one that asks left out."""
        return next(value for name, value in self.metrics().items() if "in_flight" in name) - 1

    def cpu_seconds(self):
        """Return the processor time used so far (proc(5): utime and stime)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def reload(self, config=None, pattern="configuration (not )?reloaded"):
        """Send SIGHUP, with another configuration if one is given; return the line about it."""
        start = len(self.stderr_lines)
        if config is not None:
            self.write_config(config)
        self.process.send_signal(signal.SIGHUP)
        return self.wait_for_log(pattern, start=start)

    def wait(self, seconds=10):
        """Wait for the end of the process and of its output; return the exit code."""
        end = time.monotonic() + seconds
        for thread in self._threads:  # first, since waiting for the process itself polls slowly
            thread.join(max(0.0, end - time.monotonic()))
        return self.process.wait(max(0.1, end - time.monotonic()))

    def stop(self, number=15, seconds=15):
        """Send a signal, wait for the end, return the exit code."""
        self.process.send_signal(number)
        return self.wait(seconds)


@contextlib.contextmanager
def at_once(*receivers):
    """Enter receivers that were made before, so that their processes start at the same time."""
    with contextlib.ExitStack() as stack:
        for receiver in receivers:
            stack.push(receiver.__exit__)
        for receiver in receivers:
            receiver.__enter__()
        yield receivers


def run_at_once(*runs, **options):
    """Run the program once for each list of arguments, all at the same time and to the end.

    Returns exit code, stdout and stderr of each, in the order of `runs`.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", **options}
    with contextlib.ExitStack() as stack:
        processes = []
        for run in runs:
            command = [sys.executable, "-S", compiled_program(), *map(str, run)]
            processes.append(stack.enter_context(subprocess.Popen(command, **options)))
            stack.callback(processes[-1].kill)
        said = [process.communicate(timeout=30) for process in processes]
        return [(process.returncode, *texts) for process, texts in zip(processes, said)]


@contextlib.contextmanager
def captured(stream, descriptor):
    """Collect what this process writes to a descriptor; the value is a function that returns it."""
    stream.flush()
    with tempfile.TemporaryFile() as file:

        def collected():
            stream.flush()
            return os.pread(file.fileno(), 1 << 20, 0).decode()

        saved = os.dup(descriptor)
        os.dup2(file.fileno(), descriptor)
        try:
            yield collected
        finally:
            stream.flush()
            os.dup2(saved, descriptor)
            os.close(saved)


class ReceiverTest(unittest.TestCase):
    """Tests that share one receiver, which must neither fail nor end."""

    config = config_of()

    @classmethod
    def setUpClass(cls):
        cls.receiver = Receiver(cls.config).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def tearDown(self):
        self.assertIsNone(self.receiver.process.poll())
        for line in list(self.receiver.stderr_lines):
            self.assertNotRegex(line, r"Traceback|internal error| ERROR |^\s")

    def wait_for_line(self, text):
        """Return the one line on stdout with this text."""
        if isinstance(text, bytes):
            text = text.decode()
        lines = deadline_poll(lambda: [one for one in self.receiver.stdout_lines if text in one])
        self.assertEqual(len(lines), 1)
        return json.loads(lines[0])

    def assert_not_on_stdout(self, text):
        """Check that nothing with this text was accepted."""
        last = new_body(filler="after " + text)
        self.assertEqual(self.receiver.deliver(last).status, 200)
        self.wait_for_line(last)
        lines = [line for line in self.receiver.stdout_lines if text in line]
        self.assertEqual(len(lines), 1)


class LogTest(unittest.TestCase):
    """Tests whose log is in a folder that outlives the receivers."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="log-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.log = self.folder / "alerts.jsonl"

    def config(self, webhook=None, **webclient_info):
        return config_of(webhook=webhook, **{"log_file": str(self.log), **webclient_info})

    def started(self, webhook=None, **webclient_info):
        """Return a receiver with this log, still to be entered."""
        return Receiver(self.config(webhook, **webclient_info))

    def read_log(self, *logs):
        """Return the parsed lines of the log, or of these."""
        return parse_lines(b"".join(log.read_bytes() for log in logs or [self.log]))

    def script(self, text):
        """Return the path of a shell script that starts the receiver with $PYTHON."""
        path = self.folder / "start"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o700)
        return str(path)

    def small_disk(self):
        """Mount a disk of 256 KiB of which 24 are free; return its folder and the ballast."""
        if sys.platform != "linux" or os.geteuid() != 0:
            self.skipTest("needs to mount a small file system")
        disk = self.folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
        try:
            subprocess.run(mount, check=True, stderr=subprocess.PIPE)
        except (OSError, subprocess.CalledProcessError) as error:
            self.skipTest(f"no tmpfs can be mounted: {error}")
        self.addCleanup(subprocess.run, ["umount", "-l", str(disk)], check=False)
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * (256 - 24) * 1024)
        return disk, ballast


class UnreadStdout:
    """A receiver whose stdout is a pipe that is not read until `read_on`."""

    HUGE = 300_000  # bytes: more than a pipe takes

    def __init__(self, config):
        read_end, write_end = os.pipe()
        self.pipe = open(read_end, "rb", buffering=0)
        self.receiver = Receiver(config, stdout=write_end)
        os.close(write_end)
        self.parts, self.thread = [], None

    def __enter__(self):
        return self, self.receiver.__enter__()

    def __exit__(self, *exc):
        self.receiver.__exit__()
        if self.thread:
            self.thread.join(10)
        self.pipe.close()

    def wait_until_written(self):
        """Wait until something stands in the pipe."""
        assert select.select([self.pipe], [], [], 10)[0], "nothing comes on stdout"

    def read_some(self, size):
        """Read once, at most `size` bytes."""
        self.wait_until_written()
        self.parts.append(self.pipe.read(size))

    def read_on(self):
        """Read from now on, in a thread."""
        read = functools.partial(self.pipe.read, 65536)
        self.thread = threading.Thread(target=lambda: self.parts.extend(iter(read, b"")))
        self.thread.start()

    def end(self):
        """Kill the receiver; return what it wrote, as lines."""
        self.receiver.process.kill()
        self.thread.join(10)
        return parse_lines(b"".join(self.parts))


class Senders:
    """Threads that deliver as Central does; every second one keeps its connection.

    With `repeat`, what got no 200 is sent again, in turn as the same bytes and signed anew;
    without it, a sender ends at its first failure. `accepted` holds the delivery IDs that got a
    200, `statuses` counts the answers, and `errors` the connections that gave none.
    """

    def __init__(self, port, count=8, repeat=True, keep_alive=True):
        self.port, self.repeat, self.keep_alive, self.token = port, repeat, keep_alive, TOKEN
        self.accepted, self.statuses, self.errors = [], collections.Counter(), collections.Counter()
        self.rounds = [0] * count  # deliveries that each has begun
        self.stopping, self.deadline = threading.Event(), time.monotonic() + 30
        self.threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(count)
        ]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc):
        self.finish()

    def finish(self, seconds=15):
        """Begin nothing new; return when all that was begun is settled."""
        self.stopping.set()
        self.deadline = min(self.deadline, time.monotonic() + seconds)
        end = self.deadline + 10
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))

    def wait_for_accepted(self, more, seconds=20):
        """Wait until this many more deliveries have got their 200."""
        goal = len(self.accepted) + more
        deadline_poll(
            lambda: len(self.accepted) >= goal, seconds, f"no {more} accepted: {self.errors}"
        )

    def change_token(self, token):
        """Sign with another token; return when nothing signed with the old one is on its way."""
        self.token, before = token, list(self.rounds)
        deadline_poll(
            lambda: all(now > then for now, then in zip(self.rounds, before)), 20, "a sender hangs"
        )

    def _run(self, number):
        keep_alive, connection = self.keep_alive and number % 2, None
        while not self.stopping.is_set() and time.monotonic() < self.deadline:
            self.rounds[number] += 1
            body = new_body()
            headers = central_headers(body, self.token)
            delivery_id, attempt, status = headers["X-Central-Delivery-ID"], 0, 0
            while status != 200 and time.monotonic() < self.deadline:
                attempt += 1
                if attempt % 2 == 0:
                    headers = central_headers(body, self.token, delivery_id=delivery_id)
                request = raw_request(headers=headers, body=body)
                status, connection = self._send(connection, request, keep_alive)
                if status == 200:
                    self.accepted.append(delivery_id)
                elif not self.repeat and not status:
                    return
                elif not status:
                    time.sleep(0.005)
        if connection is not None:
            connection.socket.close()

    def _send(self, connection, data, keep_alive):
        """Send a request; return its status (0: no answer), and the connection if it goes on."""
        status = 0
        try:
            connection = connection or Connection(self.port)
            connection.send(data)
            answer = connection.read()
            status = answer.status
            self.statuses[status] += 1
            if keep_alive and answer.headers.get("connection") != "close":
                return status, connection
        except (OSError, EOFError) as error:  # refused, reset, closed or silent
            self.errors[type(error).__name__] += 1
        if connection is not None:
            connection.socket.close()
        return status, None
