"""What the thread that serves must survive: own code that raises anything, missing threads, slow reloads, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path

from tests.support import (
    PATH,
    PROGRAM,
    TOP,
    Receiver,
    config_of,
    deadline_poll,
    new_body,
    raw_request,
)

HEALTH = raw_request("GET", "/health", length=False)


def is_refused(port):
    """Tell whether nobody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class OwnProgram(unittest.TestCase):
    """The program, imported by a few lines that change something in it."""

    def start(self, lines, *arguments, **webclient_info):
        """Return a receiver, still to be entered, of a program that runs `lines` before `main`."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        program = Path(folder.name, "own.py")
        head = f"import sys\nsys.path.insert(0, {str(TOP)!r})\nimport central_webhook_client as client\n"
        program.write_text(f"{head}{lines}\nsys.exit(client.main())\n")
        return Receiver(config_of(**webclient_info), arguments, program=program)

    def test_whatever_own_code_raises_changes_no_answer_and_is_logged(self):
        kinds = ["SystemExit(3)", "KeyboardInterrupt()", "GeneratorExit()", "StopIteration()"]
        kinds.append("type('Timeout', (BaseException,), {})()")
        lines = f"kinds = iter([{', '.join(kinds)}])\n"
        lines += "def own(delivery):\n    raise next(kinds)\nclient.handle_alert = own"
        with self.start(lines) as receiver:
            for kind in kinds:
                with self.subTest(kind):
                    self.assertEqual(200, receiver.deliver().status)
            receiver.wait_for_log("ERROR handle_alert: SystemExit: 3")
            receiver.wait_for_log("ERROR handle_alert: Timeout")
            self.assertEqual(200, receiver.request(HEALTH).status)
            self.assertEqual(0, receiver.stop())
        self.assertFalse([line for line in receiver.stderr_lines if "Traceback" in line])

    def test_a_traceback_holds_nothing_unescaped(self):
        lines = "def own(delivery):\n    raise ValueError(delivery.payload['text'])\nclient.handle_alert = own"
        with self.start(lines, "--verbose") as receiver:
            body = new_body(text="\x1b[2J\u202e\n2026-01-01T00:00:00.000Z forged")
            self.assertEqual(200, receiver.deliver(body).status)
            receiver.wait_for_log("raise ValueError")
        log = "\n".join(receiver.stderr_lines)
        self.assertNotRegex(log, "[\x1b\u202e]|\n2026-01-01")

    def test_own_code_gets_what_was_kept_in_its_order_and_the_end_waits_for_it(self):
        lines = (
            "import time\ndef own(delivery):\n    time.sleep(0.01)\n"
            "    open('seen', 'a').write(delivery.delivery_id + '\\n')\nclient.handle_alert = own"
        )
        with self.start(lines, log_file="deliveries.log") as receiver:
            senders = [threading.Thread(target=receiver.deliver) for _ in range(40)]
            for sender in senders:
                sender.start()
            for sender in senders:
                sender.join(10)
            self.assertEqual(0, receiver.stop())
            with open(receiver.folder / "deliveries.log") as log:
                kept = [json.loads(line)["delivery_id"] for line in log]
            self.assertEqual(kept, (receiver.folder / "seen").read_text().split())
            self.assertEqual(40, len(kept))

    def test_a_coroutine_function_is_refused_at_the_start(self):
        for lines in (
            "async def own(delivery):\n    pass\nclient.handle_alert = own",
            "import functools\nasync def own(delivery, x):\n    pass\n"
            "client.handle_alert = functools.partial(own, x=1)",
            "class Own:\n    async def __call__(self, delivery):\n        pass\n"
            "client.handle_alert = Own()",
            "client.handle_alert = 'post_to_slack'",
        ):
            receiver = self.start(lines)
            self.addCleanup(receiver.__exit__)
            with self.subTest(lines):
                self.assertEqual(1, receiver.wait())
                self.assertEqual(1, len(receiver.stderr_lines), receiver.stderr_lines)
                self.assertIn("error: handle_alert: ", receiver.stderr_lines[0])

    def test_a_thread_that_cannot_be_started_is_started_later(self):
        lines = (
            "import os, threading\noriginal = threading.Thread.start\ndef start(self):\n"
            "    if os.path.exists('full'):\n        raise RuntimeError(\"can't start new thread\")\n"
            "    original(self)\nthreading.Thread.start = start"
        )
        with self.start(lines, log_file="deliveries.log") as receiver:
            (receiver.folder / "full").touch()
            with receiver.connect(timeout=0.2) as connection, self.assertRaises(socket.timeout):
                connection.send(HEALTH)
                connection.read()
            (receiver.folder / "full").unlink()
            self.assertEqual(200, receiver.deliver().status)

    @unittest.skipUnless(hasattr(os, "fdatasync"), "needs fdatasync")
    def test_a_reload_while_the_disk_hangs_says_so_and_keeps_the_old_configuration(self):
        lines = (
            "import os, time\noriginal = os.fdatasync\ndef sync(log):\n"
            "    while os.path.exists('hang'):\n        time.sleep(0.01)\n    original(log)\nos.fdatasync = sync"
        )
        with self.start(lines, log_file="deliveries.log", request_timeout_seconds=0.1) as receiver:
            (receiver.folder / "hang").touch()
            answers = []
            sender = threading.Thread(target=lambda: answers.append(receiver.deliver().status))
            sender.start()
            deadline_poll(lambda: receiver.request(HEALTH).status == 503)
            receiver.process.send_signal(signal.SIGHUP)
            receiver.wait_for_log("configuration not reloaded.*the output is stuck")
            self.assertEqual(503, receiver.deliver().status)
            (receiver.folder / "hang").unlink()
            sender.join(10)
            self.assertEqual([200], answers)
            self.assertEqual(200, receiver.deliver().status)


class Tokens(unittest.TestCase):
    def test_any_of_several_tokens_matches_after_any_other_and_is_named_by_its_place(self):
        tokens = ["first-token", "second-token", "third-token"]
        with Receiver(
            config_of(webhook={"name": "noc", "path": PATH, "token": tokens})
        ) as receiver:
            for position in (2, 2, 0, 1, 2, 1, 0, 0, 1):
                self.assertEqual(200, receiver.deliver(token=tokens[position]).status)
                self.assertEqual(401, receiver.deliver(token="a fourth").status)
            receiver.wait_for_log("token 3 of 3 still matches")
            receiver.wait_for_log("token 2 of 3 still matches")
            named = [line for line in receiver.stderr_lines if "still matches" in line]
            self.assertEqual(2, len(named))  # at most once a minute each, and the first never
            receiver.write_config(
                config_of(receiver.port, {"name": "noc", "path": PATH, "token": tokens[:1]})
            )
            receiver.process.send_signal(signal.SIGHUP)
            receiver.wait_for_log("configuration reloaded")
            self.assertEqual(200, receiver.deliver(token=tokens[0]).status)
            self.assertEqual(401, receiver.deliver(token=tokens[1]).status)


@unittest.skipUnless(hasattr(os, "mkfifo"), "needs named pipes")
class SlowReload(unittest.TestCase):
    def test_a_configuration_that_takes_long_to_read_holds_up_nobody(self):
        with Receiver() as receiver:
            pipe = receiver.folder / "tokens"
            os.mkfifo(pipe, 0o600)
            webhook = {"name": "noc", "path": PATH, "token_file": "tokens"}
            receiver.write_config(config_of(receiver.port, webhook))
            receiver.process.send_signal(signal.SIGHUP)
            with open(pipe, "w") as tokens:  # waits until the receiver has opened it as well
                self.assertEqual(200, receiver.request(HEALTH).status)
                self.assertEqual(200, receiver.deliver().status)
                tokens.write("another-token\n")
            receiver.wait_for_log("configuration reloaded")
            self.assertEqual(401, receiver.deliver().status)
            self.assertEqual(200, receiver.deliver(token="another-token").status)


class Ends(unittest.TestCase):
    def test_a_closed_stderr_leaves_stdout_to_the_alerts(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "input_info.json")
            path.write_text("{")
            command = [
                "sh",
                "-c",
                'exec "$0" "$1" -i="$2" 2>&-',
                sys.executable,
                str(PROGRAM),
                str(path),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, timeout=30)
        self.assertEqual((78, b""), (done.returncode, done.stdout))

    def test_a_signal_after_stdout_has_gone_does_not_change_the_exit_code(self):
        reading, writing = os.pipe()
        with Receiver(config_of(request_timeout_seconds=5), stdout=writing) as receiver:
            os.close(writing)
            with receiver.connect() as unfinished:  # a request in flight keeps it draining
                unfinished.send(b"POST / HTTP/1.1\r\n")
                os.close(reading)
                self.assertEqual(503, receiver.deliver().status)
                deadline_poll(lambda: is_refused(receiver.port))
                receiver.process.send_signal(signal.SIGTERM)
                unfinished.send(b"Host: localhost\r\nContent-Length: 0\r\n\r\n")
                self.assertEqual(404, unfinished.read().status)
            self.assertEqual(1, receiver.wait())

    def test_a_reload_after_a_stop_is_none(self):
        with Receiver(config_of(request_timeout_seconds=5)) as receiver:
            with receiver.connect() as unfinished:
                unfinished.send(b"POST / HTTP/1.1\r\n")
                self.assertEqual(200, receiver.request(HEALTH).status)
                receiver.process.send_signal(signal.SIGTERM)
                deadline_poll(lambda: is_refused(receiver.port))
                receiver.process.send_signal(signal.SIGHUP)
                unfinished.send(b"Host: localhost\r\nContent-Length: 0\r\n\r\n")
                self.assertEqual(404, unfinished.read().status)
            self.assertEqual(0, receiver.wait())
        self.assertFalse([line for line in receiver.stderr_lines if "reloaded" in line])


if __name__ == "__main__":
    unittest.main()
