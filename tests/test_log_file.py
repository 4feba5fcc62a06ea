"""The log file and the memory: what a 200 promises survives a kill, a full disk and a restart."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path

from tests.support import (
    DUPLICATE,
    OK,
    PATH,
    TOKEN,
    Receiver,
    at_once,
    central_headers,
    config_of,
    new_body,
    raw_request,
    resource,
)
from tests.test_life import Senders
from tests.test_server import FaultCase

URL = "https://www.example.com/centralwebhook"
HALF_LINE = b'{"received_at": "2026-11-21T20:35:12.123Z", "webhook": "noc", "type": "cent'

WATCH_SYNC = """
import errno, os

def watch(name):
    real = getattr(os, name, None)
    def sync(descriptor):
        if os.path.exists(os.environ["SYNC_FAILS"]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)
        found = os.fstat(descriptor)
        with open(os.environ["SYNC_TRACE"], "a") as trace:
            trace.write("%d %d\\n" % (found.st_ino, found.st_size))
    if real:
        setattr(os, name, sync)

watch("fsync")
watch("fdatasync")
"""


def ip_fabric_headers(body, token=TOKEN):
    """Sign a body as IP Fabric does."""
    return {"X-IPF-Signature": hmac.new(token.encode(), body, hashlib.sha256).hexdigest()}


def bracken_headers(body, token=TOKEN):
    """Sign a body as Bracken does."""
    digest = hmac.new(token.encode(), body, hashlib.sha256).digest()
    return {"Authorization": "HMACSHA256 " + base64.b64encode(digest).decode()}


def entrupy_headers(body, token=TOKEN):
    """Sign a body as Entrupy does."""
    digest = hmac.new(token.encode(), body, hashlib.sha256).digest()
    return {"Entrupy-Signature": "SHA256:" + base64.b64encode(digest).decode()}


def new_central_headers(created, token=TOKEN):
    """Sign as new Central does: not the body, only where it goes and when."""
    parameters = f'("@method" "@target-uri");created={int(created)};alg="hmac-sha256"'
    base = f'"@method": POST\n"@target-uri": {URL}\n"@signature-params": {parameters}'
    digest = hmac.new(token.encode(), base.encode(), hashlib.sha256).digest()
    return {
        "Signature-Input": f"sig1={parameters}",
        "Signature": f"sig1=:{base64.b64encode(digest).decode()}:",
    }


@functools.lru_cache(maxsize=None)
def kept_deliveries():
    """Have a receiver keep three deliveries, two of "noc" and one of "fabric"; return (body,
    headers, log line)s.
    """
    webhooks = [
        {"name": "noc", "path": PATH, "token": TOKEN},
        {"name": "fabric", "type": "ip-fabric", "path": "/fabric", "token": TOKEN},
    ]
    deliveries = []
    with Receiver(config_of(webhook=webhooks, log_file="alerts.jsonl")) as receiver:
        for path, sign in (
            (PATH, central_headers),
            (PATH, central_headers),
            ("/fabric", ip_fabric_headers),
        ):
            body = new_body()
            headers = sign(body)
            assert receiver.post(body, headers, path).json == OK
            deliveries.append((body, headers))
        lines = (receiver.folder / "alerts.jsonl").read_bytes().splitlines(keepends=True)
    return [(*delivery, line) for delivery, line in zip(deliveries, lines)]


class LogCase(unittest.TestCase):
    """A folder of its own for the log, which outlives the receivers that write to it."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="log-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.log = self.folder / "alerts.jsonl"

    def receiver(self, webhook=None, log=None, **options):
        return Receiver(config_of(webhook=webhook, log_file=str(log or self.log)), **options)

    def read_log(self, log=None):
        """Return the parsed lines, as a reader does: what is not JSON is a half line, passed
        over.
        """
        found = []
        for line in (log or self.log).read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def assert_end_with_1(self, logs):
        """Start a receiver for each of these log files, all at once: none can serve, each names its
        file.
        """
        receivers = {name: self.receiver(log=log) for name, log in logs.items()}
        for receiver in receivers.values():
            self.addCleanup(receiver.__exit__)
        for name, receiver in receivers.items():
            with self.subTest(name):
                self.assertEqual(receiver.wait(15), 1)
                said = "\n".join(receiver.stderr_lines)
                self.assertRegex(
                    said, rf"^central_webhook_client\.py: error: .*{re.escape(str(logs[name]))}.*$"
                )
                self.assertEqual(len(receiver.stderr_lines), 1)


class Lines(LogCase):
    """What stands in the log, and when."""

    @classmethod
    def setUpClass(cls):
        cls.webhooks = [
            {"name": "noc", "type": "central", "path": PATH, "token": TOKEN},
            {"name": "fabric", "type": "ip-fabric", "path": "/fabric", "token": TOKEN},
            {"name": "users", "type": "bracken", "path": "/users", "token": TOKEN},
        ]
        cls.running = Receiver(config_of(webhook=cls.webhooks, log_file="alerts.jsonl")).__enter__()
        cls.addClassCleanup(cls.running.__exit__)

    def test_a_line_is_that_of_stdout_plus_its_key(self):
        latin_body = '{"text": "Störung"}'.encode("latin-1")
        cases = [
            ("JSON", b'{"b": 1.50, "a": [1e3, "\xc3\xa4"], "key": "x"}', "alert"),
            ("text", b"<snapshot>ready</snapshot>", "body"),
            ("text that looks like the end of a line", b'x"}\n{"key": "00", "y": "', "body"),
            ("not UTF-8", latin_body, "body_base64"),
        ]
        senders = [
            (PATH, central_headers),
            ("/fabric", ip_fabric_headers),
            ("/users", bracken_headers),
        ]
        receiver, log = self.running, self.running.folder / "alerts.jsonl"
        count = len(log.read_bytes().splitlines())
        receiver.wait_for_stdout(count)
        for (path, sign), webhook in zip(senders, self.webhooks):
            for name, body, field in cases:
                with self.subTest(webhook["type"], body=name):
                    self.assertEqual(receiver.post(body, sign(body), path).json, OK)
                    count += 1
                    shown = receiver.wait_for_stdout(count)[-1]
                    kept = log.read_text().split("\n")[:-1]
                    self.assertEqual(len(kept), count)
                    self.assertEqual(kept[-1][: len(shown) - 1], shown[:-1])
                    line = json.loads(shown)
                    self.assertIn(field, line)
                    self.assertNotIn("key", line)
                    logged = json.loads(kept[-1])
                    self.assertIn("key", logged)
                    del logged["key"]
                    self.assertEqual(logged, line)
                    self.assertEqual(line["webhook"], webhook["name"])

    def test_a_delivery_that_got_200_survives_a_kill_at_once(self):
        ids = []
        with self.receiver() as receiver:
            with receiver.connect() as connection:
                for _ in range(5):
                    body = new_body()
                    headers = central_headers(body)
                    connection.send(raw_request(headers=headers, body=body))
                    self.assertEqual(connection.read().status, 200)
                    ids.append(headers["X-Central-Delivery-ID"])
                receiver.process.kill()
                receiver.wait()
        self.assertEqual([line["delivery_id"] for line in self.read_log()], ids)

    def test_a_200_waits_until_the_line_is_synced_and_a_failed_sync_keeps_nothing(self):
        (self.folder / "sitecustomize.py").write_text(WATCH_SYNC)
        trace, fails = self.folder / "trace", self.folder / "fails"
        environment = {
            "PYTHONPATH": str(self.folder),
            "SYNC_TRACE": str(trace),
            "SYNC_FAILS": str(fails),
        }
        with self.receiver(environment=environment, python=[sys.executable]) as receiver:
            for _ in range(3):
                trace.write_text("")
                self.assertEqual(receiver.deliver().status, 200)
                found = self.log.stat()
                self.assertIn(f"{found.st_ino} {found.st_size}", trace.read_text().splitlines())
            before = self.log.read_bytes()
            fails.touch()
            body = new_body()
            headers = central_headers(body)
            for _ in range(2):
                self.assertEqual(receiver.post(body, headers).status, 503)
                self.assertEqual(
                    receiver.request(raw_request("GET", "/health", length=False)).status, 503
                )
            fails.unlink()
            self.assertEqual(receiver.post(body, headers).json, OK)
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
            self.assertEqual(
                receiver.request(raw_request("GET", "/health", length=False)).status, 200
            )
        self.assertTrue(self.log.read_bytes().startswith(before))
        keys = [line["key"] for line in self.read_log()]
        self.assertEqual(len(set(keys)), 4)
        self.assertEqual(len(set(keys[3:])), 1, "a repetition has the same key")

    def test_large_lines_of_simultaneous_senders_never_mix(self):
        answers, bodies = [], [new_body(filler=letter * 150_000) for letter in "abcdefgh"]
        receiver, log = self.running, self.running.folder / "alerts.jsonl"
        before = len(self.read_log(log))
        threads = [
            threading.Thread(target=lambda body=body: answers.append(receiver.deliver(body).status))
            for body in bodies
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        self.assertEqual(answers, [200] * len(bodies))
        lines = receiver.wait_for_stdout(before + len(bodies))
        for written in (map(json.loads, lines), self.read_log(log)):
            alerts = [line["alert"] for line in list(written)[before:]]
            self.assertEqual(
                sorted(alerts, key=lambda alert: alert["number"]),
                [json.loads(body) for body in bodies],
            )

    def test_what_the_log_already_holds_stays_and_is_reported_if_it_gives_nothing(self):
        self.log.write_bytes(b'{"from": "another program"}\nnot JSON at all\n\n')
        with self.receiver() as receiver:
            receiver.wait_for_log("WARNING nothing remembered from ")
            self.assertEqual(receiver.deliver().status, 200)
        lines = self.log.read_bytes().splitlines()
        self.assertEqual(lines[:3], [b'{"from": "another program"}', b"not JSON at all", b""])
        self.assertEqual(len(lines), 4)


class HalfLines(LogCase):
    """A power loss or a kill in the middle of a write."""

    def test_a_half_line_at_the_end_becomes_a_line_of_its_own_and_is_reported(self):
        whole = b'{"whole": 1}\n{"whole": 2}\n'
        cases = {
            "alone in the file": (b"", HALF_LINE),
            "a block of zeros": (whole, b"\0" * 4096),
            "several megabytes": (whole, b"x" * 3_500_000),
        }
        logs = {name: self.folder / name / "alerts.jsonl" for name in cases}
        for name, (start, half) in cases.items():
            logs[name].parent.mkdir()
            logs[name].write_bytes(start + half)
        with at_once(*(self.receiver(log=log) for log in logs.values())) as receivers:
            for receiver, (name, (start, half)) in zip(receivers, cases.items()):
                with self.subTest(name):
                    receiver.wait_for_log(r" WARNING .*alerts\.jsonl.*half")
                    self.assertEqual(logs[name].read_bytes(), start + half)
                    self.assertEqual(receiver.deliver().status, 200)
                    data = logs[name].read_bytes()
                    self.assertTrue(data.startswith(start + half + b"\n{"))
                    self.assertEqual(self.read_log(logs[name])[-1]["webhook"], "noc")

    def test_a_log_that_another_program_has_cut_goes_on_with_a_line_of_its_own(self):
        with self.receiver() as receiver:
            self.assertEqual(receiver.deliver().json, OK)
            os.truncate(self.log, self.log.stat().st_size - 20)
            self.assertEqual(receiver.deliver().json, OK)
            half, whole = self.log.read_bytes().splitlines()
        self.assertRaises(ValueError, json.loads, half)
        self.assertEqual(json.loads(whole)["webhook"], "noc")

    def test_a_whole_line_that_lacks_its_line_feed_is_remembered(self):
        (_, _, first), (body, headers, last), _ = kept_deliveries()
        self.log.write_bytes(first + last[:-1])
        with self.receiver() as receiver:
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
            self.assertEqual(receiver.deliver().json, OK)
        self.assertEqual(len(self.read_log()), 3)

    def test_the_delivery_of_a_half_line_is_accepted_when_it_is_sent_again(self):
        (_, _, first), (body, headers, last), _ = kept_deliveries()
        self.log.write_bytes(first + last[:-2])
        with self.receiver() as receiver:
            self.assertEqual(receiver.post(body, headers).json, OK)
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
        self.assertEqual(len(self.read_log()), 2)

    @unittest.skipUnless(hasattr(resource, "prlimit"), "needs to change limits of a process")
    def test_wherever_a_write_is_cut_readers_see_every_200_once(self):
        with self.receiver() as receiver:
            process, hard = receiver.process.pid, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            self.assertEqual(receiver.deliver().status, 200)
            length = self.log.stat().st_size
            accepted = 1
            seen = b""
            for missing in (length, length - 1, 3, 2, 1):  # of the next line, which is as long
                body = new_body(filler="x" * 20)
                headers = central_headers(body)
                end = self.log.stat().st_size + 2 * length - missing
                resource.prlimit(process, resource.RLIMIT_FSIZE, (end, hard))
                statuses = [receiver.post(body, headers).status]
                while statuses[-1] == 200 and len(statuses) < 5:
                    accepted += 1
                    body = new_body(filler="x" * 20)
                    headers = central_headers(body)
                    statuses.append(receiver.post(body, headers).status)
                self.assertEqual(statuses[-1], 503)
                data = self.log.read_bytes()
                self.assertTrue(data.startswith(seen), "the log has shrunk or changed")
                seen = data
                resource.prlimit(process, resource.RLIMIT_FSIZE, (hard, hard))
                self.assertEqual(receiver.post(body, headers).json, OK)
                accepted += 1
            keys = [line["key"] for line in self.read_log()]
            self.assertEqual((len(keys), len(set(keys))), (accepted, accepted))


class LostName(LogCase):
    """A log that was moved, deleted or replaced is opened again under its name."""

    def test_no_delivery_goes_into_a_file_without_a_name(self):
        old = self.folder / "old"
        changes = {
            "moved": lambda: self.log.rename(old),
            "deleted": self.log.unlink,
            "replaced": lambda: (self.log.rename(old), self.log.touch()),
        }
        with self.receiver() as receiver:
            for what, change in changes.items():
                with self.subTest(what):
                    self.assertEqual(receiver.deliver().status, 200)
                    start = len(receiver.stderr_lines)
                    change()
                    body = new_body()
                    headers = central_headers(body)
                    self.assertEqual(receiver.post(body, headers).json, OK)
                    self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
                    receiver.wait_for_log("INFO .*opened again", start=start)
                    ids = [line["delivery_id"] for line in self.read_log()]
                    self.assertEqual(ids, [headers["X-Central-Delivery-ID"]])

    def test_if_it_cannot_be_opened_again_nothing_is_accepted(self):
        with self.receiver() as receiver:
            self.log.unlink()
            self.log.mkdir()
            body = new_body()
            headers = central_headers(body)
            self.assertEqual(receiver.post(body, headers).status, 503)
            self.log.rmdir()
            self.assertEqual(receiver.post(body, headers).json, OK)
        self.assertEqual(len(self.read_log()), 1)


class FullDisk(LogCase):
    """No space left: no 200 for what is not kept, and it goes on as soon as there is space."""

    def health(self, receiver):
        return receiver.request(raw_request("GET", "/health", length=False)).status

    def fill_and_recover(self, receiver, log, make_room):
        """Deliver until the disk is full, make room, repeat everything; check what is kept."""
        sent, accepted, refused, seen = [], [], [], b""
        for size in (
            900,
            10,
            300,
            2500,
        ) * 25:  # of several sizes, so that some writes end within a line
            body = new_body(filler="x" * size)
            sent.append((body, central_headers(body)))
            answer = receiver.post(*sent[-1])
            if answer.status == 200:
                accepted.append(sent[-1])
            else:
                self.assertEqual(answer.status, 503)
                self.assertEqual(self.health(receiver), 503)
                refused.append(sent[-1])
                self.assertTrue(log.read_bytes().startswith(seen), "the log has shrunk")
                seen = log.read_bytes()
                kept = [line["delivery_id"] for line in self.read_log(log)]
                self.assertEqual(
                    kept, [headers["X-Central-Delivery-ID"] for _, headers in accepted]
                )
                if len(refused) >= 4:
                    break
        self.assertGreater(len(accepted), 2, "it was full from the start")
        self.assertGreaterEqual(len(refused), 4, "it was never full")
        self.assertIsNone(receiver.process.poll())
        receiver.wait_for_log(r" ERROR ")
        make_room()
        for body, headers in refused:
            self.assertEqual(receiver.post(body, headers).json, OK)
            self.assertEqual(self.health(receiver), 200)
        for body, headers in sent:
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
        kept = [line["delivery_id"] for line in self.read_log(log)]
        self.assertEqual(
            sorted(kept), sorted(headers["X-Central-Delivery-ID"] for _, headers in sent)
        )
        shown = {json.loads(line)["delivery_id"] for line in receiver.wait_for_stdout(len(sent))}
        self.assertEqual(shown, set(kept))
        self.assertTrue(log.read_bytes().startswith(seen), "the log has shrunk or changed")
        return sent

    @unittest.skipUnless(
        sys.platform == "linux" and os.geteuid() == 0, "needs to mount a small file system"
    )
    def test_a_full_disk_loses_nothing_and_keeps_nothing_twice(self):
        disk = self.folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
        try:
            subprocess.run(mount, check=True, stderr=subprocess.PIPE)
        except (OSError, subprocess.CalledProcessError) as error:
            self.skipTest(f"no tmpfs can be mounted: {error}")
        self.addCleanup(subprocess.run, ["umount", "-l", str(disk)], check=False)
        ballast, log = disk / "ballast", disk / "alerts.jsonl"
        ballast.write_bytes(b"x" * (256 - 24) * 1024)
        with self.receiver(log=log) as receiver:
            sent = self.fill_and_recover(receiver, log, ballast.unlink)
        with self.receiver(log=log) as receiver:
            for body, headers in random.sample(sent, 3):
                self.assertEqual(receiver.post(body, headers).json, DUPLICATE)

    @unittest.skipUnless(
        hasattr(resource, "prlimit"), "needs to change the limits of a running process"
    )
    def test_a_file_that_may_not_grow_loses_nothing_and_keeps_nothing_twice(self):
        with self.receiver() as receiver:
            process, hard = receiver.process.pid, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.prlimit(process, resource.RLIMIT_FSIZE, (20_000, hard))
            self.fill_and_recover(
                receiver,
                self.log,
                lambda: resource.prlimit(process, resource.RLIMIT_FSIZE, (hard, hard)),
            )


class Opening(LogCase):
    """What cannot be a log file, and that it belongs to one receiver."""

    def test_a_log_file_that_cannot_be_opened_ends_the_program_with_1(self):
        directory = self.folder / "directory"
        fifo = self.folder / "fifo"
        directory.mkdir()
        cases = {
            "no such directory": self.folder / "missing" / "alerts.jsonl",
            "a directory": directory,
            "a device": Path("/dev/null"),
        }
        if hasattr(os, "mkfifo"):
            os.mkfifo(fifo)
            cases["a FIFO"] = fifo
        self.assert_end_with_1(cases)
        self.assertFalse((self.folder / "missing").exists())

    @unittest.skipIf(sys.platform == "win32", "files are not locked there")
    def test_a_second_receiver_on_the_same_log_is_refused_with_1(self):
        link = self.folder / "link"
        with self.receiver() as receiver:
            link.symlink_to(self.log)
            self.assert_end_with_1({"the same path": self.log, "a link to it": link})
            self.assertEqual(receiver.deliver().status, 200)
            receiver.process.kill()
            receiver.wait()
            with self.receiver() as successor:
                self.assertEqual(successor.deliver().status, 200)
        self.assertEqual(len(self.read_log()), 2)


class Kill(FaultCase):
    """SIGKILL, the power loss that a test can make."""

    def test_a_kill_at_any_moment_loses_nothing_and_keeps_nothing_twice(self):
        chance = random.Random()
        with Senders(1, 8) as senders:
            for _ in range(5):
                with Receiver(self.config()) as receiver:
                    senders.port = receiver.port
                    senders.wait_for_accepted(chance.randrange(10, 80))
                    receiver.process.kill()
                    receiver.wait()
            with Receiver(self.config()) as receiver:
                senders.port = receiver.port
                senders.wait_for_accepted(20)
                senders.finish()
                self.assertEqual(self.health(receiver), 200)
        ids = self.logged_ids()
        self.assertEqual(len(ids), len(set(ids)), "a delivery stands in the log twice")
        self.assertEqual(set(ids), set(senders.accepted), "a delivery is lost")
        self.assertEqual(set(senders.statuses) - {200, 503}, set())
