"""What a second look at the receiver found: memories over reloads, readers that stall, costly and foreign input."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
import unittest

from tests.support import PROGRAM, TOKEN, Receiver, central_headers, config_of, new_body, raw_request

OK, DUPLICATE = {"status": "ok"}, {"status": "duplicate"}


def hook(name, **more):
    """Return a classic webhook with a path of its own."""
    return {"name": name, "path": f"/{name}", "token": TOKEN, **more}


class Reload(unittest.TestCase):
    def reload(self, receiver, config):
        lines = len(receiver.stderr_lines)
        receiver.write_config(config)
        receiver.process.send_signal(signal.SIGHUP)
        return receiver.wait_for_log("configuration (not )?reloaded", start=lines)

    def test_a_webhook_that_was_away_remembers_what_the_log_holds(self):
        both = config_of(webhook=[hook("a"), hook("b")], log_file="out.jsonl")
        body = new_body()
        headers = central_headers(body)
        with Receiver(both) as receiver:
            self.assertEqual(receiver.post(body, headers, "/a").json, OK)
            self.reload(receiver, config_of(webhook=[hook("b")], log_file="out.jsonl"))
            self.assertEqual(receiver.post(body, headers, "/a").status, 404)
            self.reload(receiver, both)
            self.assertEqual(receiver.post(body, headers, "/a").json, DUPLICATE)
            self.assertEqual(receiver.post(body, headers, "/b").json, OK)
            self.assertEqual(len((receiver.folder / "out.jsonl").read_text().splitlines()), 2)

    def test_a_log_that_a_reload_brings_is_remembered(self):
        with_log, without = config_of(log_file="out.jsonl"), config_of()
        body = new_body()
        headers = central_headers(body)
        with Receiver(with_log) as receiver:
            self.assertEqual(receiver.post(body, headers).json, OK)
            self.assertEqual(receiver.stop(), 0)
            with Receiver(without) as second:
                (second.folder / "out.jsonl").write_bytes((receiver.folder / "out.jsonl").read_bytes())
                self.reload(second, with_log)
                self.assertEqual(second.post(body, headers).json, DUPLICATE)
                self.assertEqual(second.deliver().json, OK)

    def test_a_configuration_with_nameless_webhooks_of_no_type_does_not_stop_the_receiver(self):
        wrong = [{"type": "x", "token": "t"}, {"type": "x", "token": "t"}, hook("a"), hook("a")]
        with Receiver() as receiver:
            self.assertIn("not reloaded", self.reload(receiver, config_of(webhook=wrong)))
            self.assertEqual(receiver.deliver().json, OK)


class Memory(unittest.TestCase):
    def test_another_webhook_that_fills_the_log_displaces_nothing(self):
        body = new_body()
        headers = central_headers(body)
        config = config_of(webhook=[hook("a"), hook("b", type="bracken")], log_file="out.jsonl")
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        line = {"received_at": now, "webhook": "b", "type": "bracken", "delivery_id": None, "sent_at": None}
        with Receiver(config) as receiver:
            self.assertEqual(receiver.post(body, headers, "/a").json, OK)
            self.assertEqual(receiver.stop(), 0)
            log = (receiver.folder / "out.jsonl").read_text()
        log += (json.dumps({**line, "alert": {}, "key": None}) + "\n") * 210_000
        with Receiver(config_of()) as receiver:
            (receiver.folder / "out.jsonl").write_text(log)
            receiver.write_config(config)
            receiver.process.send_signal(signal.SIGHUP)
            receiver.wait_for_log("configuration reloaded")
            self.assertEqual(receiver.post(body, headers, "/a").json, DUPLICATE)


class Log(unittest.TestCase):
    def test_a_file_that_holds_no_deliveries_is_not_cut(self):
        receiver = Receiver(config_of(log_file="input_info.json"))
        try:
            before = receiver.config_path.read_bytes()
            self.assertEqual(receiver.process.wait(10), 1)
            self.assertEqual(receiver.config_path.read_bytes(), before)
        finally:
            receiver.__exit__()
        self.assertEqual(len(receiver.stderr_lines), 1)
        self.assertIn("error: ", receiver.stderr_lines[0])


class Stalls(unittest.TestCase):
    def test_a_reader_of_stderr_that_stalls_holds_up_nobody(self):
        with Receiver() as receiver:
            self.assertEqual(receiver.stop(), 0)
            receiver.write_config(config_of(port=receiver.port))
            read_end, write_end = os.pipe()
            if hasattr(fcntl, "F_SETPIPE_SZ"):
                fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), f"-i={receiver.config_path}", "--verbose"],
                stdout=subprocess.DEVNULL,
                stderr=write_end,
            )
            try:
                os.close(write_end)
                os.read(read_end, 1)  # it has started; from here on nobody reads
                for _ in range(150 if hasattr(fcntl, "F_SETPIPE_SZ") else 1500):  # a line of 50 characters each
                    self.assertEqual(receiver.deliver().json, OK)
                process.terminate()
                self.assertEqual(process.wait(10), 0)
            finally:
                process.kill()
                process.wait(10)
                os.close(read_end)

    def test_a_terminal_that_stalls_means_503(self):
        master, slave = pty.openpty()
        try:
            with Receiver(config_of(request_timeout_seconds=0.5), stdout=slave) as receiver:
                statuses, started = set(), time.monotonic()
                while 503 not in statuses and time.monotonic() - started < 20:
                    statuses.add(receiver.deliver(new_body(filler="x" * 3000)).status)
                self.assertEqual(statuses, {200, 503})
                self.assertEqual(receiver.deliver().status, 503)
                self.assertEqual(receiver.stop(), 0)
        finally:
            os.close(master)
            os.close(slave)


@unittest.skipUnless(os.path.exists("/proc/self/stat"), "needs /proc")
class Cost(unittest.TestCase):
    def test_a_signature_over_thousands_of_parameters_costs_little(self):
        names = [f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz0123456789"]
        covered = " ".join(f'"@query-param";name="{name}"' for name in names)
        webhook = {"name": "n", "type": "new-central", "token": TOKEN, "public_url": "https://example.com/n"}
        headers = {"Signature": "s=:AAAA:", "Signature-Input": f's=("@method" {covered});created={int(time.time())}'}
        with Receiver(config_of(webhook=webhook)) as receiver:
            for _ in range(20):
                answer = receiver.request(raw_request("POST", "/n?" + "&".join(names), headers, b"{}"))
                self.assertEqual(answer.status, 401)
            with open(f"/proc/{receiver.process.pid}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            self.assertLess(used, 10, f"{used} s for 20 requests")



class OddInput(unittest.TestCase):
    def ended(self, config, *arguments):
        """Return exit code and stderr lines of a receiver that ends by itself."""
        receiver = Receiver(config, arguments)
        try:
            code = receiver.process.wait(10)
        finally:
            receiver.__exit__()
        return code, receiver.stderr_lines

    def test_odd_settings_are_refused_in_one_line(self):
        new_central = {"type": "new-central", "token": TOKEN, "public_url": "https://example.com/health"}
        odd_key = hook("a", api_key={"header": "x-key", "value": "SECRET\nKEY"})
        host = config_of()
        host["webclient_info"]["host"] = "a..b"
        for code, config, arguments in (
            (1, host, ()),
            (1, config_of(log_file="."), ("--check-config",)),
            (78, config_of(webhook=new_central), ("--check-config",)),
            (78, config_of(webhook=odd_key), ("--check-config",)),
        ):
            with self.subTest(config=config):
                ended, lines = self.ended(config, *arguments)
                self.assertEqual((ended, len(lines)), (code, 1), lines)
                self.assertTrue(lines[0].startswith("central_webhook_client.py: error: "))
                self.assertNotIn("SECRET", lines[0])

    def test_an_empty_line_before_a_request_may_come_in_two_parts(self):
        with Receiver() as receiver, receiver.connect() as connection:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.send(raw_request("GET", "/health", length=False))
            self.assertEqual(connection.read().status, 200)
            connection.send(b"\r")
            with receiver.connect() as other:  # answered after the first part has arrived
                other.send(raw_request("GET", "/health", length=False))
                self.assertEqual(other.read().status, 200)
            connection.send(b"\n" + raw_request("GET", "/health", length=False))
            self.assertEqual(connection.read().status, 200)
