"""The log file: what a 200 promises survives a kill, a full disk, a rotation and a restart."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import unittest
from pathlib import Path

from tests.support import (
    DUPLICATE,
    OK,
    PATH,
    TOKEN,
    LogTest,
    Receiver,
    Senders,
    at_once,
    central_headers,
    config_of,
    hmac_sha256,
    hook,
    ids_of,
    in_parallel,
    new_body,
    signed,
)

try:
    import resource
except ImportError:  # Windows
    resource = None

HALF_LINE = b'{"received_at": "2026-11-21T20:35:12.123Z", "webhook": "noc", "type": "cent'

needs_prlimit = unittest.skipUnless(
    hasattr(resource, "prlimit"), "needs to change the limits of a running process"
)


def limit_file_size(receiver, size=None):
    """Let no file of a receiver grow beyond `size` bytes, or all of them again."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limits = (hard if size is None else size, hard)
    resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE, limits)


class Lines(unittest.TestCase):
    """What stands in the log."""

    @classmethod
    def setUpClass(cls):
        webhooks = [
            {"name": "noc", "path": PATH, "token": TOKEN},
            hook("fabric", type="ip-fabric"),
            hook("users", type="bracken"),
            hook("field", api_key={"field": "apiKey", "value": "K-very-secret"}),
        ]
        config = config_of(webhook=webhooks, log_file="alerts.jsonl")
        cls.receiver = Receiver(config).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def log(self):
        return (self.receiver.folder / "alerts.jsonl").read_text("ascii").split("\n")[:-1]

    def deliver(self, body, headers, path=PATH):
        """Deliver; return the new lines on stdout and in the log."""
        count = len(self.log())
        self.assertEqual(self.receiver.post(body, headers, path).json, OK)
        shown, log = self.receiver.wait_for_stdout(count + 1), self.log()
        self.assertEqual((len(shown), len(log)), (count + 1, count + 1))
        return shown[-1], log[-1]

    def test_a_line_is_that_of_stdout_with_the_key_at_its_end(self):
        bodies = {
            "alert": b'{"b": 1.50, "a": [1e3, "\xc3\xa4"], "key": "x"}',
            "body": b'x"}\n{"key": "00", "y": "',
            "body_base64": '{"text": "Störung"}'.encode("latin-1"),
        }
        keys = set()
        for field, body in bodies.items():
            digest = hmac_sha256(TOKEN, body).hex()
            for path, headers in (
                (PATH, central_headers(body)),
                ("/fabric", {"X-IPF-Signature": digest}),
            ):
                with self.subTest(path, field=field):
                    shown, logged = self.deliver(body, headers, path)
                    self.assertTrue(logged.startswith(shown[:-1] + ', "key": "'))
                    line = json.loads(logged)
                    self.assertEqual(list(line), [*json.loads(shown), "key"])
                    self.assertIn(field, line)
                    keys.add(line["key"])
        self.assertEqual(len(keys), 6)

    def test_a_masked_api_key_is_masked_here_too(self):
        body = b'{"apiKey":"K-very-secret","a":1}'
        for line in self.deliver(body, central_headers(body), "/field"):
            self.assertEqual(json.loads(line)["alert"], {"apiKey": "***", "a": 1})

    def test_large_lines_of_simultaneous_senders_never_mix(self):
        before = len(self.log())
        bodies = [new_body(filler=letter * 150_000) for letter in "abcdefgh"]
        answers = in_parallel(lambda body: self.receiver.deliver(body).status, bodies)
        self.assertEqual(answers, [200] * len(bodies))
        expected = sorted(body.decode() for body in bodies)
        for lines in (self.receiver.wait_for_stdout(before + len(bodies)), self.log()):
            alerts = [json.dumps(json.loads(line)["alert"]) for line in lines[before:]]
            self.assertEqual(sorted(alerts), expected)


class Kill(LogTest):
    """SIGKILL, the power loss that a test can make."""

    def test_a_delivery_that_got_200_survives_a_kill_at_once(self):
        sent = [signed() for _ in range(3)]
        with self.started() as receiver:
            for body, headers in sent:
                self.assertEqual(receiver.post(body, headers).status, 200)
            receiver.process.kill()
            receiver.wait()
        expected = [headers["X-Central-Delivery-ID"] for _, headers in sent]
        self.assertEqual(ids_of(self.read_log()), expected)

    def test_a_kill_at_any_moment_loses_nothing_and_repeats_nothing(self):
        chance = random.Random()
        with Senders(1, 8) as senders:
            for _ in range(5):
                with self.started() as receiver:
                    senders.port = receiver.port
                    senders.wait_for_accepted(chance.randrange(10, 80))
                    receiver.process.kill()
                    receiver.wait()
            with self.started() as receiver:
                senders.port = receiver.port
                senders.wait_for_accepted(20)
                senders.finish()
                self.assertEqual(receiver.health(), 200)
        ids = ids_of(self.read_log())
        self.assertEqual(len(ids), len(set(ids)), "a delivery stands in the log twice")
        self.assertEqual(set(ids), set(senders.accepted), "a delivery is lost")
        self.assertLessEqual(set(senders.statuses), {200, 503})


class HalfLines(LogTest):
    """A write that ended half-way."""

    def test_a_log_that_another_program_has_cut_goes_on_with_a_line_of_its_own(self):
        with Receiver(config_of(log_file="alerts.jsonl")) as receiver:
            log = receiver.folder / "alerts.jsonl"
            self.assertEqual(receiver.deliver().json, OK)
            os.truncate(log, log.stat().st_size - 20)
            for _ in range(2):
                self.assertEqual(receiver.deliver().json, OK)
            half, *whole = log.read_bytes().splitlines()
            self.assertRaises(ValueError, json.loads, half)
            self.assertEqual(["noc"] * 2, [json.loads(line)["webhook"] for line in whole])
            os.truncate(log, 0)
            self.assertEqual(receiver.deliver().json, OK)
            self.assertEqual(1, len(log.read_bytes().splitlines()))

    def test_a_half_line_at_the_end_becomes_a_line_of_its_own(self):
        whole = b'{"whole": 1}\n{"whole": 2}\n'
        cases = {
            "alone in the file": HALF_LINE,
            "after whole lines": whole + HALF_LINE,
            "a block of zeros": whole + b"\0" * 4096,
            "several megabytes": whole + b"x" * 3_500_000,
        }
        logs = [self.folder / f"{number}.jsonl" for number in range(len(cases))]
        for log, data in zip(logs, cases.values()):
            log.write_bytes(data)
        with at_once(*(self.started(log_file=str(log)) for log in logs)) as receivers:
            for receiver, log, (what, data) in zip(receivers, logs, cases.items()):
                with self.subTest(what):
                    self.assertEqual(log.read_bytes(), data)
                    self.assertEqual(receiver.deliver().status, 200)
                    self.assertTrue(log.read_bytes().startswith(data + b"\n{"))
                    self.assertEqual(self.read_log(log)[-1]["webhook"], "noc")

    @needs_prlimit
    def test_wherever_a_write_is_cut_readers_see_every_200_once(self):
        body = b'{"of": "one length, as its line in the log"}'
        with self.started() as receiver:
            self.assertEqual(receiver.deliver(body).status, 200)
            length, seen = self.log.stat().st_size, b""
            for missing in (1, 2, 3, length - 1, length):  # 1: the line is whole without its end
                with self.subTest(missing=missing):
                    limit_file_size(receiver, self.log.stat().st_size + 2 * length - missing)
                    self.assertEqual(receiver.deliver(body).status, 200)
                    headers = central_headers(body)
                    status = 200 if missing == 1 else 503
                    self.assertEqual(receiver.post(body, headers).status, status)
                    data = self.log.read_bytes()
                    self.assertTrue(data.startswith(seen), "the log has shrunk or changed")
                    self.assertTrue(missing == length or not data.endswith(b"\n"))
                    seen = data
                    limit_file_size(receiver)
                    answer = DUPLICATE if missing == 1 else OK
                    self.assertEqual(receiver.post(body, headers).json, answer)
            keys = [line["key"] for line in self.read_log()]
            self.assertEqual((len(keys), len(set(keys))), (11, 11))


class LostName(LogTest):
    """A log that was moved, deleted or replaced is opened again under its name."""

    def test_no_delivery_goes_into_a_file_without_a_name(self):
        old = self.folder / "old"
        changes = {
            "moved": lambda: self.log.rename(old),
            "deleted": self.log.unlink,
            "replaced": lambda: (self.log.rename(old), self.log.touch()),
        }
        with self.started() as receiver:
            for what, change in changes.items():
                with self.subTest(what):
                    self.assertEqual(receiver.deliver().status, 200)
                    start = len(receiver.stderr_lines)
                    change()
                    body, headers = signed()
                    self.assertEqual(receiver.post(body, headers).json, OK)
                    self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
                    receiver.wait_for_log("INFO .*opened again", start=start)
                    self.assertEqual(ids_of(self.read_log()), [headers["X-Central-Delivery-ID"]])

    def test_nothing_is_accepted_while_the_log_cannot_be_opened_again(self):
        with self.started() as receiver:
            self.log.unlink()
            self.log.mkdir()
            body, headers = signed()
            self.assertEqual(receiver.post(body, headers).status, 503)
            self.log.rmdir()
            self.assertEqual(receiver.post(body, headers).json, OK)
        self.assertEqual(len(self.read_log()), 1)

    def test_a_log_that_is_rotated_under_load_loses_no_delivery(self):
        logs = [self.log.with_suffix(f".{number}") for number in range(4)]
        with self.started() as receiver, Senders(receiver.port, 4) as senders:
            for old in logs:
                senders.wait_for_accepted(25)
                self.log.rename(old)
            senders.wait_for_accepted(25)
            senders.finish()
        self.assertEqual(dict(senders.statuses), {200: len(senders.accepted)})
        ids = ids_of(self.read_log(*logs, self.log))
        self.assertEqual(sorted(ids), sorted(senders.accepted))


class FullDisk(LogTest):
    """No 200 for what is not stored, and it goes on as soon as there is space."""

    def fill_and_recover(self, receiver, log, make_room):
        """Deliver until the disk is full, make room, repeat everything; return what was sent."""
        sent, accepted, refused, seen = [], [], [], b""
        for size in (900, 10, 300, 2500) * 25:  # so that some writes end within a line
            body, headers = signed(filler="x" * size)
            sent.append((body, headers))
            status = receiver.post(body, headers).status
            if status == 200:
                accepted.append(headers["X-Central-Delivery-ID"])
                continue
            self.assertEqual((status, receiver.health()), (503, 503))
            self.assertTrue(log.read_bytes().startswith(seen), "the log has shrunk")
            seen = log.read_bytes()
            self.assertEqual(ids_of(self.read_log(log)), accepted)
            refused.append((body, headers))
            if len(refused) == 4:
                break
        self.assertGreater(len(accepted), 2, "it was full from the start")
        self.assertEqual(len(refused), 4, "it was never full")
        self.assertIsNone(receiver.process.poll())
        receiver.wait_for_log(r" ERROR ")
        make_room()
        for one in refused:
            self.assertEqual(receiver.post(*one).json, OK)
            self.assertEqual(receiver.health(), 200)
        for one in sent:
            self.assertEqual(receiver.post(*one).json, DUPLICATE)
        ids = {headers["X-Central-Delivery-ID"] for _, headers in sent}
        self.assertEqual(sorted(ids_of(self.read_log(log))), sorted(ids))
        shown = receiver.wait_for_stdout(len(sent))  # what was refused may be repeated there
        self.assertEqual({json.loads(line)["delivery_id"] for line in shown}, ids)
        self.assertTrue(log.read_bytes().startswith(seen), "the log has shrunk or changed")
        return sent

    def test_a_full_disk_loses_nothing_and_repeats_nothing(self):
        disk, ballast = self.small_disk()
        log = disk / "alerts.jsonl"
        with self.started(log_file=str(log)) as receiver:
            sent = self.fill_and_recover(receiver, log, ballast.unlink)
        with self.started(log_file=str(log)) as receiver:
            for one in random.sample(sent, 3):
                self.assertEqual(receiver.post(*one).json, DUPLICATE)


class Opening(LogTest):
    """What cannot be a log file, and that it belongs to one receiver."""

    def assert_each_ends_with_1(self, logs):
        """Start a receiver for each of these files, all at once: each ends and names its file."""
        receivers = [self.started(log_file=str(log)) for log in logs]
        for receiver in receivers:
            self.addCleanup(receiver.__exit__)
        for receiver, log in zip(receivers, logs):
            with self.subTest(log.name):
                self.assertEqual(receiver.wait(15), 1)
                (line,) = receiver.stderr_lines
                start = re.escape("central_webhook_client.py: error: ")
                self.assertRegex(line, rf"\A{start}.*{re.escape(str(log))}")

    def test_a_log_file_that_cannot_be_opened_ends_the_program_with_1(self):
        directory, fifo = self.folder / "directory", self.folder / "fifo"
        directory.mkdir()
        logs = [self.folder / "missing" / "alerts.jsonl", directory, Path("/dev/null")]
        if hasattr(os, "mkfifo"):
            os.mkfifo(fifo)
            logs.append(fifo)
        self.assert_each_ends_with_1(logs)
        self.assertFalse((self.folder / "missing").exists())

    @unittest.skipIf(sys.platform == "win32", "files are not locked there")
    def test_a_second_receiver_on_the_same_log_is_refused_until_the_first_is_gone(self):
        link = self.folder / "link"
        with self.started() as receiver:
            link.symlink_to(self.log)
            self.assert_each_ends_with_1([self.log, link])
            self.assertEqual(receiver.deliver().status, 200)
            receiver.process.kill()
            receiver.wait()
            with self.started() as successor:
                self.assertEqual(successor.deliver().status, 200)
        self.assertEqual(len(self.read_log()), 2)
