"""The recipes of README.md with the real tools, taken from its text: only paths and ports are replaced."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from ..support import PROGRAM, Receiver, config_of, deadline_poll, new_body
from ..test_readme import block, section
from . import parts

RECIPES = section("Send alerts on")
LOG = "/var/lib/centralwebhook/central.jsonl"
LONG = 20_000  # characters: more than the 8 KiB at which rsyslog cuts by default


class RecipeTest(unittest.TestCase):
    """A folder of its own, programs in it, and their end."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="recipes-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def spawn(self, command, stdout=None, environment=None):
        """Start a command, or a line for the shell, in a process group of its own that ends with the test."""
        command = ["sh", "-c", command] if isinstance(command, str) else command
        with (self.folder / (stdout or "output")).open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.addCleanup(self.end, process)
        return process

    @staticmethod
    def end(process, number=signal.SIGTERM):
        """End a process group of ours."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(15)

    def run_shell(self, command, environment=None):
        """Run a line for the shell to its end."""
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        self.assertEqual(0, done.returncode, done.stdout)
        return done.stdout

    def receiver(self):
        """Start a receiver that writes central.jsonl in the folder."""
        running = Receiver(config_of(log_file=str(self.folder / "central.jsonl")))
        return self.enter(running)

    def enter(self, context):
        """Enter a context until the end of the test."""
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def log_lines(self):
        return (self.folder / "central.jsonl").read_text().splitlines()

    def read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""


class PipeTest(RecipeTest):
    def test_jq_picks_alerts_out_of_the_pipe(self):
        parts.need_program("jq")
        config = self.folder / "input_info.json"
        config.write_text(json.dumps(config_of()))
        config.chmod(0o600)
        command = block("sh", "python3", RECIPES).replace(
            f"python3 {PROGRAM.name}", f"'{sys.executable}' '{PROGRAM}'"
        )
        self.spawn(f"{{ {command}\n}} 2>errors", "picked")
        running = Receiver.__new__(Receiver)  # of which only the port is used
        running.port = int(
            deadline_poll(lambda: self.read("errors").partition(" port ")[2].split(" ")[0])
        )
        for body in (
            new_body(severity="Critical", description="one"),
            new_body(severity="Minor", description="two"),
            b"[1]",
            b"no JSON",
            new_body(severity="Critical", description="three"),
        ):
            self.assertEqual(200, running.deliver(body).status)
        picked = deadline_poll(
            lambda: self.read("picked").count("\n") > 1 and self.read("picked").splitlines()
        )
        self.assertEqual(["one", "three"], [json.loads(line)[1] for line in picked])


class ChatTest(RecipeTest):
    def test_a_chat_gets_each_alert(self):
        for program in ("jq", "curl", "tail"):
            parts.need_program(program)
        received = []

        class Chat(BaseHTTPRequestHandler):
            def do_POST(self):
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                texts = [one["text"] for one in received]
                failing = (
                    "AP Down" in texts[-1] and texts.count(texts[-1]) == 1
                )  # once: curl tries again
                self.send_response(503 if failing else 200)
                self.end_headers()

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Chat)
        self.addCleanup(server.server_close)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.shutdown)
        command = block("sh", "title=", RECIPES)
        receiver = self.receiver()
        self.spawn(
            command, environment={"CHAT_URL": f"http://127.0.0.1:{server.server_address[1]}/"}
        )
        self.wait_for_tail(receiver, received)
        del received[:]
        expected = []
        for body, text in (
            (
                new_body(description='"AP" \\ 1\'s $HOME `x` é'),
                'Major: AP disconnected: "AP" \\ 1\'s $HOME `x` é',
            ),
            (b'{"name": "AP Down", "summary": "s", "severity": "Minor"}', "Minor: AP Down: s"),
            (b"[1]", "-: noc: "),
            (b"no JSON", "-: noc: "),
        ):
            self.assertEqual(200, receiver.deliver(body).status)
            expected.append({"text": text})
        expected.insert(1, expected[1])  # this one was refused at first
        deadline_poll(lambda: len(received) >= 5, 20)
        self.assertEqual(expected, received)

        command = command.partition("tail ")[0] + 'tail -n 1 central.jsonl | jq -c "$to_teams"'
        (attachment,) = json.loads(self.run_shell(command))["attachments"]
        self.assertEqual("application/vnd.microsoft.card.adaptive", attachment["contentType"])
        self.assertEqual(
            [{"type": "TextBlock", "wrap": True, "text": "-: noc: "}], attachment["content"]["body"]
        )

    def wait_for_tail(self, receiver, received):
        """Deliver until something arrives (tail begins at the end), and until all of that has come."""
        sent = []

        def arrives():
            if not received:
                sent.append(f"number {len(sent)}")
                self.assertEqual(200, receiver.deliver(new_body(description=sent[-1])).status)
                time.sleep(0.05)
            return received and received[-1]["text"].endswith(sent[-1])

        deadline_poll(arrives, 20)


class SqliteTest(RecipeTest):
    def test_each_delivery_is_in_the_database_once(self):
        parts.need_program("sqlite3")
        receiver, command = self.receiver(), block("sh", "sqlite3 alerts.db", RECIPES)
        for body in (
            new_body(description='a|b,"c"\'d\t\x1f é'),
            new_body(),
            b'{"name": "AP Down"}',
            b"no JSON",
        ):
            self.assertEqual(200, receiver.deliver(body).status)
        self.assertEqual("|2\nMajor|2\n", self.run_shell(command))
        self.assertEqual(200, receiver.deliver(new_body()).status)
        lines = self.log_lines()
        with (self.folder / "central.jsonl").open(
            "a"
        ) as log:  # a line that is being written at this moment
            log.write('{"received_at": "2026-')
        self.assertEqual(["|2", "Major|3"], self.run_shell(command).splitlines()[-2:])
        query = "SELECT line FROM alert ORDER BY received_at; SELECT key FROM alert ORDER BY received_at"
        found = self.run_shell(f'sqlite3 alerts.db "{query}"').splitlines()
        self.assertEqual(sorted(lines), sorted(found[:5]))
        self.assertEqual(sorted(json.loads(line)["key"] for line in lines), sorted(found[5:]))


class QueueTest(RecipeTest):
    def start_broker(self):
        """Start a RabbitMQ of our own on loopback, with all its files in the folder; return its URL."""
        server = next(
            (path for path in Path("/usr/lib/rabbitmq").glob("**/bin/rabbitmq-server")), None
        )
        parts.need("rabbitmq-server", lambda: server)
        epmd = parts.need_program("epmd")
        port, distribution, mapper = parts.free_ports(3)
        folder = self.folder / "broker"
        folder.mkdir()
        (folder / "env").touch()
        (folder / "plugins").write_text("[].\n")
        self.spawn([epmd, "-port", str(mapper), "-address", "127.0.0.1"])
        names = {
            "CONF_ENV_FILE": "env",
            "MNESIA_BASE": "mnesia",
            "LOG_BASE": "log",
            "GENERATED_CONFIG_DIR": "generated",
            "ENABLED_PLUGINS_FILE": "plugins",
            "PID_FILE": "pid",
            "CONFIG_FILE": "rabbitmq",
        }
        environment = {f"RABBITMQ_{name}": str(folder / path) for name, path in names.items()}
        environment.update(
            HOME=str(folder),
            ERL_EPMD_PORT=str(mapper),
            ERL_EPMD_ADDRESS="127.0.0.1",
            RUNNING_UNDER_SYSTEMD="1",
            RABBITMQ_LOGS="-",
            RABBITMQ_NODENAME="recipes@localhost",
            RABBITMQ_NODE_IP_ADDRESS="127.0.0.1",
            RABBITMQ_NODE_PORT=str(port),
            RABBITMQ_DIST_PORT=str(distribution),
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1} +S 1:1",
        )
        broker = self.spawn([str(server)], "broker.log", environment)

        def is_up():
            self.assertIsNone(broker.poll(), self.read("broker.log"))
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), timeout=1),
            ):
                return "startup complete" in self.read("broker.log")

        deadline_poll(is_up, 60, "the broker does not start")
        return f"amqp://guest:guest@127.0.0.1:{port}"

    def test_each_line_of_the_log_gets_to_a_consumer(self):
        for program in ("amqp-declare-queue", "amqp-publish", "amqp-consume", "tail"):
            parts.need_program(program)
        environment, receiver = {"AMQP_URL": self.start_broker()}, self.receiver()
        publish, consume = (
            block("sh", "amqp-declare-queue", RECIPES),
            block("sh", "while sleep 1", RECIPES),
        )
        self.assertIn("sleep 1; do\n  timeout 60 ", consume)
        consume = consume.replace("sleep 1", "sleep 0.1").replace("timeout 60", "timeout 1")
        program = self.folder / "one-alert"  # fails once, and gets that alert again
        program.write_text(
            "#!/bin/sh\nif [ ! -e failed ]; then touch failed; exit 1; fi\ncat >>consumed\n"
        )
        program.chmod(0o755)
        self.assertEqual(200, receiver.deliver(new_body(text="x" * LONG)).status)
        publisher = self.spawn(publish, environment=environment)
        self.spawn(consume, environment=environment)
        self.assertEqual(200, receiver.deliver().status)
        self.assertEqual(200, receiver.deliver().status)
        self.wait_for_lines(self.log_lines())
        self.end(publisher)
        self.assertEqual(200, receiver.deliver().status)  # while nothing publishes
        lines = self.log_lines()
        self.spawn(publish, environment=environment)
        self.wait_for_lines(lines)
        keys = {json.loads(line)["key"] for line in self.read("consumed").splitlines()}
        self.assertEqual({json.loads(line)["key"] for line in lines}, keys)

    def wait_for_lines(self, lines):
        deadline_poll(
            lambda: set(lines) <= set(self.read("consumed").splitlines()), 20, "a line is missing"
        )


class RsyslogTest(RecipeTest):
    def test_the_second_host_gets_the_same_lines_across_a_rotation(self):
        rsyslogd = parts.need_program("rsyslogd")
        (port,) = parts.free_ports(1)
        first, second = (
            block("conf", f'global(maxMessageSize="8m")\nmodule(load="{name}")', RECIPES)
            for name in ("imfile", "imtcp")
        )
        for old, new in (
            (LOG, str(self.folder / "central.jsonl")),
            ("second.example.com", "127.0.0.1"),
            ('Port="10514"', f'Port="{port}"'),
            ("/var/log/central.jsonl", str(self.folder / "copy.jsonl")),
        ):
            self.assertIn(old, first + second)
            first, second = first.replace(old, new), second.replace(old, new)
        second = second.replace('type="imtcp"', 'type="imtcp" Address="127.0.0.1"')
        receiver = self.receiver()
        lines = []
        for name, text in (("second", second), ("first", first)):
            work = self.folder / name
            work.mkdir()
            text = text.replace("global(", f'global(workDirectory="{work}" ')
            (self.folder / f"{name}.conf").write_text(text)
            self.run_shell(f"'{rsyslogd}' -N1 -f {name}.conf -i {name}.pid")
        self.assertEqual(200, receiver.deliver(new_body(text="x" * LONG)).status)
        self.spawn([rsyslogd, "-n", "-f", "second.conf", "-i", str(self.folder / "second.pid")])
        deadline_poll(lambda: self.answers(port), 20)
        self.spawn([rsyslogd, "-n", "-f", "first.conf", "-i", str(self.folder / "first.pid")])
        for number in range(3):
            self.assertEqual(200, receiver.deliver(new_body(description="é\t\"'\\")).status)
            lines += self.log_lines()
            self.wait_for_copy(lines)
            (self.folder / "central.jsonl").rename(self.folder / f"central.jsonl.{number}")
            receiver.process.send_signal(signal.SIGHUP)
            deadline_poll((self.folder / "central.jsonl").exists)

    def wait_for_copy(self, lines):
        deadline_poll(lambda: self.read("copy.jsonl").splitlines() == lines, 30, "the copy differs")

    @staticmethod
    def answers(port):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True


class LogrotateTest(RecipeTest):
    def test_logrotate_moves_the_log_and_nothing_is_lost(self):
        logrotate = parts.need_program("logrotate")
        receiver = self.receiver()
        text = block("logrotate", LOG, RECIPES).replace(LOG, str(self.folder / "central.jsonl"))
        self.assertIn("systemctl reload centralwebhook.service", text)
        text = text.replace(
            "systemctl reload centralwebhook.service", f"kill -HUP {receiver.process.pid}"
        )
        conf = self.folder / "logrotate.conf"
        conf.write_text(text)
        conf.chmod(0o644)
        os.chmod(self.folder, 0o755)
        bodies = [new_body() for _ in range(3)]
        for body in bodies:
            self.assertEqual(200, receiver.deliver(body).status)
            self.run_shell(f"'{logrotate}' --force --state state logrotate.conf")
            deadline_poll((self.folder / "central.jsonl").exists)
        self.assertEqual("", self.read("central.jsonl"))
        self.assertTrue((self.folder / "central.jsonl.3.gz").exists())
        self.run_shell("gunzip central.jsonl.2.gz central.jsonl.3.gz")
        kept = [json.loads(self.read(f"central.jsonl.{number}"))["alert"] for number in (3, 2, 1)]
        self.assertEqual([json.loads(body) for body in bodies], kept)


if __name__ == "__main__":
    unittest.main()
