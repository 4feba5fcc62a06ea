"""What a second look at the receiver found: memories over reloads, readers that stall, costly and foreign input."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import time
import unittest

from tests.support import TOKEN, Receiver, central_headers, config_of, new_body, raw_request

OK, DUPLICATE = {"status": "ok"}, {"status": "duplicate"}


def hook(name, **more):
    """Return a classic webhook with a path of its own."""
    return {"name": name, "path": f"/{name}", "token": TOKEN, **more}


def reload(receiver, config):
    """Have a receiver read another configuration; return the line that says what came of it."""
    lines = len(receiver.stderr_lines)
    receiver.write_config(config)
    receiver.process.send_signal(signal.SIGHUP)
    return receiver.wait_for_log("configuration (not )?reloaded", start=lines)


class Reload(unittest.TestCase):
    def test_a_webhook_that_was_away_remembers_what_the_log_holds(self):
        both = config_of(webhook=[hook("a"), hook("b")], log_file="out.jsonl")
        body = new_body()
        headers = central_headers(body)
        with Receiver(both) as receiver:
            self.assertEqual(receiver.post(body, headers, "/a").json, OK)
            reload(receiver, config_of(webhook=[hook("b")], log_file="out.jsonl"))
            self.assertEqual(receiver.post(body, headers, "/a").status, 404)
            reload(receiver, both)
            self.assertEqual(receiver.post(body, headers, "/a").json, DUPLICATE)
            self.assertEqual(receiver.post(body, headers, "/b").json, OK)
            self.assertEqual(len((receiver.folder / "out.jsonl").read_text().splitlines()), 2)


class Memory(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """Make a delivery that a former receiver has kept, and the line of its log."""
        cls.body = new_body()
        cls.headers = central_headers(cls.body)
        with Receiver(config_of(webhook=hook("a"), log_file="out.jsonl")) as receiver:
            assert receiver.post(cls.body, cls.headers, "/a").json == OK
            cls.line = (receiver.folder / "out.jsonl").read_bytes()

    def test_a_log_that_a_reload_brings_is_remembered(self):
        with Receiver(config_of(webhook=hook("a"))) as receiver:
            (receiver.folder / "out.jsonl").write_bytes(self.line)
            reload(receiver, config_of(webhook=hook("a"), log_file="out.jsonl"))
            self.assertEqual(receiver.post(self.body, self.headers, "/a").json, DUPLICATE)
            body = new_body()
            self.assertEqual(receiver.post(body, central_headers(body), "/a").json, OK)

    def test_another_webhook_that_fills_the_log_displaces_nothing(self):
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        line = {
            "received_at": now,
            "webhook": "b",
            "type": "bracken",
            "delivery_id": None,
            "sent_at": None,
        }
        others = (json.dumps({**line, "alert": {}, "key": None}) + "\n").encode() * 210_000
        with Receiver(config_of()) as receiver:
            (receiver.folder / "out.jsonl").write_bytes(self.line + others)
            webhooks = [hook("a"), hook("b", type="bracken")]
            said = reload(receiver, config_of(webhook=webhooks, log_file="out.jsonl"))
            self.assertIn("configuration reloaded", said)
            self.assertEqual(receiver.post(self.body, self.headers, "/a").json, DUPLICATE)


class Stalls(unittest.TestCase):
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
        """Deliver to a receiver whose stderr nobody reads until its pipe is more than full; return it."""
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
        """Deliver to a receiver whose stdout is a terminal until that stalls, which means 503; return it."""
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


@unittest.skipUnless(os.path.exists("/proc/self/stat"), "needs /proc")
class Cost(unittest.TestCase):
    def test_a_signature_over_thousands_of_parameters_costs_little(self):
        names = [
            f"{a}{b}"
            for a in "abcdefghijklmnopqrstuvwxyz"
            for b in "abcdefghijklmnopqrstuvwxyz0123456789"
        ]
        covered = " ".join(f'"@query-param";name="{name}"' for name in names)
        webhook = {
            "name": "n",
            "type": "new-central",
            "token": TOKEN,
            "public_url": "https://example.com/n",
        }
        headers = {
            "Signature": "s=:AAAA:",
            "Signature-Input": f's=("@method" {covered});created={int(time.time())}',
        }
        with Receiver(config_of(webhook=webhook)) as receiver:
            for _ in range(20):
                answer = receiver.request(
                    raw_request("POST", "/n?" + "&".join(names), headers, b"{}")
                )
                self.assertEqual(answer.status, 401)
            with open(f"/proc/{receiver.process.pid}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            self.assertLess(used, 10, f"{used} s for 20 requests")


class OddInput(unittest.TestCase):
    def test_odd_settings_are_refused_in_one_line(self):
        new_central = {
            "type": "new-central",
            "token": TOKEN,
            "public_url": "https://example.com/health",
        }
        odd_key = hook("a", api_key={"header": "x-key", "value": "SECRET\nKEY"})
        host = config_of()
        host["webclient_info"]["host"] = "a..b"
        started = []
        for code, config, arguments in (
            (78, host, ()),
            (1, config_of(log_file="."), ("--check-config",)),
            (78, config_of(webhook=new_central), ("--check-config",)),
            (78, config_of(webhook=odd_key), ("--check-config",)),
        ):
            receiver = Receiver(config, arguments)
            self.addCleanup(receiver.__exit__)
            started.append((code, config, receiver))
        for code, config, receiver in started:  # each ends by itself
            with self.subTest(config=config):
                ended, lines = receiver.wait(), receiver.stderr_lines
                self.assertEqual((ended, len(lines)), (code, 1), lines)
                self.assertTrue(lines[0].startswith("central_webhook_client.py: error: "))
                self.assertNotIn("SECRET", lines[0])
