"""What the tests share: a receiver as a real process on a free port, signing, raw HTTP."""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import hashlib
import hmac
import json
import os
import py_compile
import re
import shutil
import socket
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
OK = {"status": "ok"}
DUPLICATE = {"status": "duplicate"}

try:  # three hundred connections need more descriptors than some systems give
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 2048:
        wanted = 2048 if hard == resource.RLIM_INFINITY else min(2048, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
except ImportError:  # Windows
    resource = None


def deadline_poll(condition, seconds=10.0, message="it did not happen in time"):
    """Return the first true value of `condition()`; fail after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.002)
    raise AssertionError(message)


def config_of(port=0, webhook=None, **webclient_info):
    """Return a configuration as a dict: one classic webhook unless `webhook` says otherwise."""
    if webhook is None:
        webhook = {"name": "noc", "path": PATH, "token": TOKEN}
    return {
        "webclient_info": {"host": "127.0.0.1", "port": port, **webclient_info},
        "central_info": {"webhook": webhook},
    }


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


def central_headers(body, token=TOKEN, service="Alerts", delivery_id=None, timestamp=None):
    """Sign a body as classic Central does; return its headers in the sender's spelling."""
    delivery_id = delivery_id or f"72d3162e-cc78-11e3-81ab-{next(_counter):012d}"
    timestamp = timestamp if timestamp is not None else now_stamp()
    signed = body + service.encode() + delivery_id.encode() + timestamp.encode()
    digest = hmac.new(token.encode(), signed, hashlib.sha256).digest()
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


def good(body=None, **request):
    """Return a request that is answered with 200."""
    body = new_body() if body is None else body
    return raw_request(headers=central_headers(body), body=body, **request)


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
        """Wait for the end of the stream; False if something else comes, or nothing in time."""
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

    def wait(self, seconds=10):
        """Wait for the end of the process and of its output; return the exit code."""
        end = time.monotonic() + seconds
        for thread in (
            self._threads
        ):  # to the end of its output, since a wait for the process itself polls slowly
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
def captured_stderr():
    """Collect what this process writes to descriptor 2; the value is a function that returns it."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: os.pread(file.fileno(), 1 << 20, 0).decode()
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


SHARED = []  # one receiver, with room and time enough, for all classes that need nothing special


def share_receiver():
    """Start the shared receiver; meant as the `setUpModule` of a module that uses `ServedTest`."""
    SHARED.append(Receiver(config_of(max_connections=512, request_timeout_seconds=20)).__enter__())
    unittest.addModuleCleanup(lambda: SHARED.pop().__exit__())


class ServedTest(unittest.TestCase):
    """One receiver for a whole class, or for all, and whatever it is sent, no traceback."""

    config = None

    @classmethod
    def setUpClass(cls):
        if cls.config is None:
            cls.receiver = SHARED[0]
        else:
            cls.receiver = Receiver(cls.config).__enter__()
            cls.addClassCleanup(cls.receiver.__exit__)

    def setUp(self):
        self.addCleanup(self.assert_sound)

    def assert_sound(self):
        self.assertIsNone(self.receiver.process.poll())
        for line in list(self.receiver.stderr_lines):
            self.assertNotRegex(line, r"Traceback|internal error| ERROR |^\s")

    def assert_reply(self, answer, status, head_only=False):
        """Check what is true of every reply."""
        self.assertEqual(answer.status, status)
        self.assertNotIn("server", answer.headers)
        self.assertTrue(answer.headers["content-length"].isdigit())
        if not head_only:
            self.assertEqual(answer.headers["content-type"].partition(";")[0], "application/json")
            self.assertEqual(list(answer.json), ["status"] if status == 200 else ["error"])
            if status == 401:
                self.assertEqual(answer.json, {"error": "unauthorized"})
        self.assertEqual("www-authenticate" in answer.headers, status == 401)
        self.assertEqual("allow" in answer.headers, status == 405)

    def assert_status(self, raw, status):
        """Send a request whole; after 200 and 401 the connection goes on, after all others it is
        closed.
        """
        with self.receiver.connect() as connection:
            connection.send(raw)
            answer = connection.read()
            self.assert_reply(answer, status)
            if status in (200, 401):
                self.assertNotEqual(answer.headers.get("connection"), "close")
                connection.send(good())
                self.assert_reply(connection.read(), 200)
            else:
                self.assertEqual(answer.headers.get("connection"), "close")
                self.assertTrue(connection.is_closed())

    def assert_statuses(self, table, status):
        for what, raw in table.items():
            with self.subTest(what):
                self.assert_status(raw, status)
