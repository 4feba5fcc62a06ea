"""forward.py of README.md: at least once and in order, whatever is killed, rotated or refused."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
from pathlib import Path

from ..support import PATH, Receiver, central_headers, config_of, deadline_poll, new_body
from . import parts
from .recipes import FORWARD, Endpoint, RecipeTest


class StopRetrying(BaseException):
    """Raised in place of a pause, to end a loop that has no end."""


class FakeTime:
    """The module `time`, but a pause takes none and is recorded."""

    def __init__(self, pauses):
        self.pauses, self.slept = pauses, []

    @staticmethod
    def time():
        return time.time()

    def sleep(self, seconds):
        self.slept.append(seconds)
        if len(self.slept) == self.pauses:
            raise StopRetrying


class TextTest(RecipeTest):
    def test_it_has_at_most_80_lines_and_is_formatted(self):
        self.assertLessEqual(len(FORWARD.splitlines()), 80)
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        ruff = parts.need("ruff", lambda: shutil.which("ruff", path=path))
        (self.folder / "forward.py").write_text(FORWARD)
        options = "--no-cache --line-length 100 --target-version py39"
        self.run_shell(f"'{ruff}' format --check {options} forward.py")
        self.run_shell(f"'{ruff}' check --select E,F,W,B,I {options} forward.py")

    def load(self, send, pauses=0):
        """Return forward.py as a namespace, with another `send` and pauses that take no time."""
        names = {"__name__": "forward"}
        exec(compile(FORWARD, "forward.py", "exec"), names)
        names.update(send=send, time=FakeTime(pauses))
        return names

    def pauses(self, error, count):
        """Return the pauses after an error that does not end."""

        def send(record):
            raise error

        names = self.load(send, count)
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(StopRetrying):
            names["deliver"]("{}", "here")
        return names["time"].slept

    @staticmethod
    def refusal(status, retry_after=None):
        headers = http.client.HTTPMessage()
        if retry_after is not None:
            headers["Retry-After"] = retry_after
        return urllib.error.HTTPError("http://localhost", status, "no", headers, None)

    def test_the_pauses_grow_to_a_minute(self):
        expected = [1, 2, 4, 8, 16, 32, 60, 60, 60]
        for error in (OSError("down"), KeyError("x"), self.refusal(500), self.refusal(302)):
            with self.subTest(error):
                self.assertEqual(expected, self.pauses(error, 9))

    def test_retry_after_is_obeyed_up_to_an_hour(self):
        for value, expected in (
            ("7", 7),
            ("120", 120),
            ("0", 1),
            ("-5", 1),
            ("9" * 50, 3600),
            ("soon", 1),
            ("", 1),
            ("nan", 1),
            ("Wed, 21 Oct 2015 07:28:00 GMT", 1),
            ("Wed, 21 Oct 99999 07:28:00 GMT", 1),
            ("Wed, 21 Oct 2999 07:28:00 GMT", 3600),
        ):
            for status in (408, 429, 503):
                with self.subTest(value, status=status):
                    self.assertEqual([expected], self.pauses(self.refusal(status, value), 1))
        date = email.utils.formatdate(time.time() + 100, usegmt=True)
        (pause,) = self.pauses(self.refusal(429, date), 1)
        self.assertAlmostEqual(100, pause, delta=5)

    def test_what_can_never_be_sent_is_skipped(self):
        deep = b"[" * 100_000

        def send(record):
            raise error

        names = self.load(send)
        for line, error in (
            (b'{"half', None),
            (b"\xff\xfe\n", None),
            (b"\0\n", None),
            (b"\n", None),
            (deep, None),
            (b"{}\n", RecursionError("an alert nested as deep as the parser allows")),
            *((b"{}\n", self.refusal(status)) for status in (400, 401, 403, 404, 410, 413, 422)),
        ):
            with self.subTest(line[:20], error=error):
                with open(self.folder / "said", "w+") as said, contextlib.redirect_stderr(said):
                    names["deliver"](line, "here")
                self.assertRegex(self.read("said"), r"\Ahere: skipped: .+\n\Z")


class EndpointTest(RecipeTest):
    def test_each_kind_of_failure_delays_and_none_loses_or_reorders(self):
        found = []
        answers = {
            1: [500, (429, {"Retry-After": "1"}, None), 200],
            2: [(302, {"Location": "/elsewhere"}, None), 200],
            3: [404],
            4: ["stall", 200],
            5: [408, 200],
        }

        def answer(request):
            self.assertEqual(("POST", "/endpoint"), (request.command, request.path))
            self.assertEqual("application/json", request.headers["Content-Type"])
            number = request.payload["alert"]["n"]
            chosen = answers.get(number, [200])
            chosen = chosen.pop(0) if len(chosen) > 1 else chosen[0]
            if chosen == "stall":
                time.sleep(1)
                return 200
            if chosen == 200:
                found.append(number)
            return chosen

        self.assertIn("timeout=10)", FORWARD)
        text = FORWARD.replace("timeout=10)", "timeout=0.5)")
        (port,) = parts.free_ports(1)
        self.append(*({"alert": {"n": n}} for n in range(1, 4)), "not JSON\n")
        self.append(*({"alert": {"n": n}} for n in range(4, 7)))
        url = f"http://127.0.0.1:{port}/endpoint"
        self.forward("--all", text=text, FORWARD_URL=url)
        deadline_poll(lambda: "again in 1 s" in self.read("output"))  # nothing listens
        endpoint = Endpoint(answer, port)
        self.addCleanup(endpoint.close)
        deadline_poll(lambda: found[-1:] == [6], 30)
        self.assertEqual([1, 2, 4, 5, 6], found)
        said = self.read("output")
        self.assertEqual(2, said.count("skipped"), said)
        self.assertRegex(said, r"at 40: skipped: HTTP Error 404: Not Found\n")
        self.assertRegex(said, r"at 60: skipped: not JSON\n")

    def test_an_idle_forwarder_uses_little_time(self):
        self.append({"alert": {}})
        process = self.forward(FORWARD_URL="http://127.0.0.1:1/")
        deadline_poll((self.folder / "central.forward.py.position").exists)
        used = self.processor_seconds(process.pid)
        time.sleep(1)
        self.assertLess(self.processor_seconds(process.pid) - used, 0.1)

    @staticmethod
    def processor_seconds(pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class RotationTest(RecipeTest):
    def setUp(self):
        super().setUp()
        self.to = self.endpoint()
        self.number = 0

    def start(self, *options, **more):
        return self.forward(*options, FORWARD_URL=self.to.url, **more)

    def write(self, count=1):
        """Append records with growing numbers."""
        for _ in range(count):
            self.number += 1
            self.append({"n": self.number})

    def rotate(self, name):
        self.log.rename(self.folder / name)

    def wait(self, *expected):
        """Wait until the endpoint got the numbers, and nothing else."""
        deadline_poll(lambda: len(self.to.requests) >= len(expected), 15, self.read("output"))
        self.assertEqual(list(expected), [payload["n"] for payload in self.to.payloads])

    def settle(self):
        """Wait until the forwarder has saved a position."""
        deadline_poll((self.folder / "central.forward.py.position").exists)

    def test_it_starts_at_the_end_and_waits_for_the_rest_of_a_line(self):
        self.write(3)
        self.append('{"n": 4')
        self.start()
        self.settle()
        self.append("4}\n", '{"n": 5}\n')
        self.wait(44, 5)

    def test_it_waits_for_a_log_that_does_not_exist(self):
        process = self.start()
        self.settle()
        self.end(process, signal.SIGKILL)
        self.write(2)  # while it was stopped
        self.start()
        self.wait(1, 2)

    def test_all_starts_at_the_oldest_file_once(self):
        for number in (3, 2, 1):
            self.write(2)
            self.rotate(f"central.jsonl.{number}")
        (self.folder / "central.jsonl.4.gz").write_bytes(b"\x1f\x8b\x08\n")
        self.write(2)
        process = self.start("--all")
        self.wait(*range(1, 9))
        deadline_poll(lambda: self.number == 8 and self.position()[1] == self.log.stat().st_size)
        self.end(process)
        self.write()
        self.start("--all")
        self.wait(*range(1, 10))

    def position(self):
        return json.loads(self.read("central.forward.py.position"))

    def test_rotations_while_it_runs_and_while_it_is_stopped(self):
        self.write()
        process = self.start("--all")
        self.wait(1)
        for name in ("central.jsonl.1", "central.jsonl-20261127", "central.jsonl.old"):
            self.write(3)
            self.rotate(name)
        self.write(2)
        self.wait(*range(1, 13))
        deadline_poll(lambda: self.position()[1] == self.log.stat().st_size)
        self.end(process, signal.SIGKILL)
        self.write(3)
        for number in range(5, 9):
            self.rotate(f"central.jsonl.{number}")
            self.write(3)
        self.start()
        self.wait(*range(1, 28))

    def test_half_lines(self):
        self.write()
        self.append('{"n": ')
        self.start("--all")
        self.wait(1)
        self.append("\n")  # the next write ended it
        self.write()
        self.append('{"n": 3')
        self.wait(1, 2)
        self.rotate("central.jsonl.1")  # now it will never be ended
        self.write()
        self.wait(1, 2, 3)
        self.assertEqual(2, self.read("output").count("skipped: not JSON"))

    def test_an_empty_new_log_does_not_end_the_rotated_one(self):
        self.write()
        self.start("--all")
        self.wait(1)
        self.rotate("central.jsonl.1")
        self.log.touch()  # by logrotate's "create"
        time.sleep(0.7)
        with (self.folder / "central.jsonl.1").open("a") as late:
            late.write('{"n": 2}\n')  # the receiver has not noticed yet
        self.number = 2
        self.wait(1, 2)
        self.write()
        self.wait(1, 2, 3)

    def test_a_deleted_log_whose_inode_is_used_again(self):
        self.write(5)
        self.rotate("central.jsonl.1")
        self.write(3)
        process = self.start("--all")
        self.wait(*range(1, 9))
        deadline_poll(lambda: self.position()[1] == self.log.stat().st_size)
        self.end(process)
        inode = self.log.stat().st_ino
        self.log.unlink()
        self.write(9)
        saved, offset = self.position()
        saved[3] = self.log.stat().st_ino  # what ext4 does by itself, now and then
        (self.folder / "central.forward.py.position").write_text(json.dumps([saved, offset]))
        self.assertGreater(inode, 0)
        self.start()
        self.wait(*range(1, 18))

    def test_a_log_that_was_deleted_while_it_runs(self):
        self.write(2)
        self.rotate("central.jsonl.1")
        self.write(2)
        self.start("--all")
        self.wait(1, 2, 3, 4)
        self.log.unlink()
        time.sleep(0.5)
        self.write(2)
        self.wait(1, 2, 3, 4, 5, 6)


class KillTest(RecipeTest):
    def test_hundreds_of_kills_lose_nothing_and_repeat_one_alert_each(self):
        to = self.endpoint()
        (port,) = parts.free_ports(1)
        config = config_of(port=port, log_file=str(self.log))
        accepted, rotated, stop = [], [], threading.Event()
        (self.folder / "forward.py").write_text(FORWARD)
        command = [sys.executable, "-S", "forward.py", "--all", "central.jsonl"]
        environment = {"FORWARD_URL": to.url}

        def send_alerts():
            number = 0
            while not stop.is_set():
                number += 1
                body = new_body(n=number)
                headers = central_headers(body)
                while not self.deliver(port, body, headers):
                    time.sleep(0.005)
                accepted.append(number)
                time.sleep(0.004)

        forwarder, receiver = self.spawn(command, None, environment), Receiver(config)
        sender = threading.Thread(target=send_alerts)
        sender.start()
        seed = random.randrange(1 << 30)
        chance = random.Random(seed)
        kills = forwarder_kills = 0
        end = time.monotonic() + 25
        try:
            while kills < 400 and time.monotonic() < end:
                time.sleep(chance.expovariate(1 / 0.06))
                if chance.random() < 0.15 and self.log.exists():
                    rotated.append(self.folder / f"central.jsonl.{len(rotated)}")
                    self.log.rename(rotated[-1])
                kills += 1
                if chance.random() < 0.7:
                    forwarder.kill()
                    forwarder.wait()
                    forwarder_kills += 1
                    forwarder = self.spawn(command, None, environment)
                else:
                    receiver.process.kill()
                    receiver.__exit__()
                    receiver = Receiver(config)
            stop.set()
            sender.join(20)
            self.assertFalse(sender.is_alive())
        finally:
            stop.set()
            receiver.__exit__()
        lines = []
        for path in (*rotated, self.log):
            for line in path.read_text().splitlines() if path.exists() else ():
                with contextlib.suppress(ValueError):  # the half line of a kill
                    lines.append(json.loads(line))
        deadline_poll(lambda: to.payloads[-1:] == lines[-1:], 30, f"seed {seed}")
        got = to.payloads
        once = [one for one, before in zip(got, [None, *got]) if one != before]
        self.assertEqual(
            [one["key"] for one in lines], [one["key"] for one in once], f"seed {seed}"
        )
        self.assertLessEqual(set(accepted), {one["alert"]["n"] for one in once}, f"seed {seed}")
        self.assertLessEqual(len(got) - len(once), forwarder_kills)
        self.assertGreater(kills, 50)
        self.assertGreater(len(rotated), 3)

    @staticmethod
    def deliver(port, body, headers):
        """Return True if the receiver answers with 200."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("POST", PATH, body, headers)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException, socket.timeout):
            return False
        finally:
            connection.close()
