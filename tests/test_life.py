"""The life of a receiver: reload, rotation, stop, systemd, all of it in the middle of traffic."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import socket
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
    PATH,
    PROGRAM,
    TOKEN,
    Connection,
    Receiver,
    at_once,
    central_headers,
    config_of,
    deadline_poll,
    new_body,
    raw_request,
)

NEW_TOKEN = "token-after-the-rotation"
TRAFFIC_ERRORS = (OSError, EOFError)  # a connection that is refused, reset, closed or silent

# The socket comes as standard input, since a shell can name that descriptor; systemd passes it as
# number 3.
PASS_SOCKET = """#!/bin/sh
exec 3<&0 </dev/null
export LISTEN_FDS=1 LISTEN_PID=${FOREIGN_PID:-$$}
exec "$PYTHON" "$@"
"""


def hook(name, **more):
    """Return a classic webhook with a path of its own."""
    return {"name": name, "path": f"/{name}", "token": TOKEN, **more}


def reload(receiver, config):
    """Have a receiver read another configuration; return the line that says what came of it."""
    lines = len(receiver.stderr_lines)
    receiver.write_config(config)
    receiver.process.send_signal(signal.SIGHUP)
    return receiver.wait_for_log("configuration (not )?reloaded", start=lines)


def is_refused(port):
    """Tell whether nobody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class Senders:
    """Threads that deliver as Central does; every second one keeps its connection.

    With `repeat`, what got no 200 is sent again, in turn as the same bytes and signed anew;
    without it, a
    sender ends at its first failure. `accepted` holds the delivery IDs that got a 200,
    `statuses` counts the
    answers, and `errors` the connections that gave none.
    """

    def __init__(self, port, count=8, repeat=True, keep_alive=True):
        self.port, self.repeat, self.keep_alive, self.token = port, repeat, keep_alive, TOKEN
        self.accepted, self.statuses, self.errors = [], collections.Counter(), collections.Counter()
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

    def wait_for_accepted(self, more, seconds=10):
        """Wait until so many more deliveries have got their 200."""
        goal = len(self.accepted) + more
        deadline_poll(
            lambda: len(self.accepted) >= goal,
            seconds,
            f"no {more} deliveries accepted: {self.errors}",
        )

    def _run(self, number):
        keep_alive, connection = self.keep_alive and number % 2, None
        while not self.stopping.is_set() and time.monotonic() < self.deadline:
            body = new_body()
            headers = central_headers(body, self.token)
            delivery_id, attempt, status = headers["X-Central-Delivery-ID"], 0, 0
            while status != 200 and time.monotonic() < self.deadline:
                attempt += 1
                if attempt % 2 == 0:
                    headers = central_headers(body, self.token, delivery_id=delivery_id)
                status, connection = self._send(
                    connection, raw_request(headers=headers, body=body), keep_alive
                )
                if status == 200:
                    self.accepted.append(delivery_id)
                elif not self.repeat and not status:
                    return
                elif not status:
                    time.sleep(0.005)
        if connection is not None:
            connection.socket.close()

    def _send(self, connection, data, keep_alive):
        """Send a request; return its status (0: no answer), and the connection if it may be used
        again.
        """
        try:
            connection = connection or Connection(self.port)
            connection.send(data)
            answer = connection.read()
            self.statuses[answer.status] += 1
            if keep_alive and answer.headers.get("connection") != "close":
                return answer.status, connection
            status = answer.status
        except TRAFFIC_ERRORS as error:
            self.errors[type(error).__name__] += 1
            status = 0
        if connection is not None:
            connection.socket.close()
        return status, None


class LifeCase(unittest.TestCase):
    """A log in a folder that outlives the receivers."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="life-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.log = self.folder / "alerts.jsonl"

    def config(self, token=TOKEN, **webclient_info):
        webhook = {"name": "noc", "path": PATH, "token": token}
        return config_of(webhook=webhook, **{"log_file": str(self.log), **webclient_info})

    @contextlib.contextmanager
    def several(self, count):
        """Start receivers with logs of their own, all at once; give them with their logs."""
        made = [Receiver(self.config(log_file="alerts.jsonl")) for _ in range(count)]
        with at_once(*made):
            yield [(receiver, receiver.folder / "alerts.jsonl") for receiver in made]

    def logged_ids(self, *logs):
        """Return the delivery IDs in the logs; fail if a line is not whole."""
        data = b"".join(log.read_bytes() for log in logs or [self.log])
        self.assertTrue(data.endswith(b"\n") or not data)
        return [json.loads(line)["delivery_id"] for line in data.splitlines()]

    def assert_refuses_connections(self, port):
        def is_refused():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) != 0

        deadline_poll(is_refused, message="still accepts connections")

    def begin_request(self, receiver, token=TOKEN):
        """Send a signed delivery but for its last byte; return connection, last byte and delivery
        ID.
        """
        body = new_body()
        headers = central_headers(body, token)
        data = raw_request(headers=headers, body=body)
        connection = receiver.connect()
        self.addCleanup(connection.socket.close)
        connection.send(data[:-1])
        deadline_poll(lambda: self.in_flight(receiver) > 1, message="the request never began")
        return connection, data[-1:], headers["X-Central-Delivery-ID"]

    def in_flight(self, receiver):
        """Return the gauge of requests in flight, the one that asks for it included."""
        text = receiver.request(raw_request("GET", "/metrics", length=False)).body.decode()
        return next(
            float(line.split()[-1])
            for line in text.splitlines()
            if "in_flight" in line and line[0] != "#"
        )


@unittest.skipUnless(hasattr(signal, "SIGHUP"), "there is no SIGHUP here")
class Reload(LifeCase):
    """SIGHUP."""

    def hang_up(self, receiver, pattern=r"reload"):
        """Send SIGHUP; return the line that says what came of it."""
        start = len(receiver.stderr_lines)
        receiver.process.send_signal(signal.SIGHUP)
        return receiver.wait_for_log(pattern, start=start)

    def wait_for_token(self, receiver, token, status=200):
        """Wait until a delivery under this token is answered so."""
        deadline_poll(
            lambda: receiver.deliver(token=token).status == status, message=f"never {status}"
        )

    def test_a_token_is_rotated_under_load_without_a_single_refusal(self):
        with Receiver(self.config()) as receiver, Senders(receiver.port, 4) as senders:
            senders.wait_for_accepted(20)
            self.assertEqual(receiver.deliver(token=NEW_TOKEN).status, 401)
            receiver.write_config(self.config(token=[NEW_TOKEN, TOKEN]))
            receiver.process.send_signal(signal.SIGHUP)
            self.wait_for_token(receiver, NEW_TOKEN)
            senders.wait_for_accepted(20)
            senders.token = NEW_TOKEN
            senders.wait_for_accepted(20)
            receiver.write_config(self.config(token=NEW_TOKEN))
            receiver.process.send_signal(signal.SIGHUP)
            self.wait_for_token(receiver, TOKEN, 401)
            senders.wait_for_accepted(20)
            senders.finish()
            self.assertEqual(dict(senders.statuses), {200: len(senders.accepted)})
            self.assertEqual(dict(senders.errors), {})
        ids = self.logged_ids()
        self.assertEqual(len(ids), len(set(ids)))
        self.assertLessEqual(set(senders.accepted), set(ids))

    def test_a_token_that_a_reload_removed_is_named_in_a_hint(self):
        with Receiver(self.config()) as receiver:
            self.assertEqual(receiver.deliver().status, 200)
            receiver.write_config(self.config(token=NEW_TOKEN))
            self.hang_up(receiver)
            start = len(receiver.stderr_lines)
            self.assertEqual(receiver.deliver(token="never-valid").status, 401)
            self.assertNotIn("older token", receiver.wait_for_log(r" WARNING .*noc", start=start))
            start = len(receiver.stderr_lines)
            self.assertEqual(receiver.deliver().status, 401)
            self.assertIn("older token", receiver.wait_for_log(r" WARNING .*noc", start=start))
            for line in receiver.stderr_lines:
                self.assertNotIn(TOKEN, line)
                self.assertNotIn(NEW_TOKEN, line)

    def test_a_broken_configuration_keeps_the_old_one_whole_and_logs_the_error(self):
        changed = self.config(token=NEW_TOKEN)
        hook = {"name": "a", "token": TOKEN}
        nameless = [{"type": "x", "token": "t"}, {"type": "x", "token": "t"}, hook, hook]
        with Receiver(self.config()) as receiver:
            cases = [
                ("no JSON", "{", "input_info.json"),
                ("an empty file", "", "input_info.json"),
                ("an unknown key", {**changed, "extra": 1}, "extra"),
                ("a port out of range", config_of(port=65536), r"webclient_info\.port"),
                ("no webhook", {**changed, "central_info": {"webhook": []}}, "webhook"),
                (
                    "nameless webhooks of no type",
                    config_of(webhook=nameless),
                    "not reloaded.*webhook",
                ),
                (
                    "a log file that cannot be opened",
                    {
                        **changed,
                        "webclient_info": {
                            **changed["webclient_info"],
                            "log_file": "missing/alerts.jsonl",
                        },
                    },
                    r"missing.alerts\.jsonl",
                ),
                ("no file", None, "input_info.json"),
            ]
            for count, (name, config, named) in enumerate(cases, 1):
                with self.subTest(name):
                    if config is None:
                        receiver.config_path.unlink()
                    else:
                        receiver.write_config(config)
                    self.hang_up(receiver, rf" ERROR .*{named}")
                    self.assertEqual(receiver.deliver().status, 200)
                    self.assertEqual(receiver.deliver(token=NEW_TOKEN).status, 401)
                    self.assertEqual(len(self.logged_ids()), count)
            receiver.write_config(changed)
            receiver.process.send_signal(signal.SIGHUP)
            self.wait_for_token(receiver, NEW_TOKEN)

    def test_a_reload_adds_and_removes_webhooks_and_forgets_no_delivery(self):
        noc, lab = ({"name": name, "path": f"/{name}", "token": TOKEN} for name in ("noc", "lab"))
        body = new_body()
        headers = central_headers(body)
        with Receiver(config_of(webhook=[noc])) as receiver:
            self.assertEqual(receiver.post(body, headers, "/noc").json, {"status": "ok"})
            self.assertEqual(receiver.post(body, headers, "/lab").status, 404)
            receiver.write_config(
                config_of(webhook=[lab, noc], max_body_bytes=500, log_file=str(self.log))
            )
            self.hang_up(receiver)
            self.assertEqual(receiver.post(body, headers, "/noc").json, {"status": "duplicate"})
            self.assertEqual(receiver.post(body, headers, "/lab").json, {"status": "ok"})
            large = new_body(filler="x" * 600)
            self.assertEqual(receiver.post(large, central_headers(large), "/lab").status, 413)
            self.assertEqual(len(self.logged_ids()), 1)
            receiver.write_config(config_of(webhook=[lab]))
            self.hang_up(receiver)
            self.assertEqual(receiver.post(body, headers, "/noc").status, 404)
            self.assertEqual(receiver.post(body, headers, "/lab").json, {"status": "duplicate"})
            self.assertNotIn(
                "restart", "\n".join(receiver.stderr_lines).lower()
            )  # same host, same port

    def test_a_log_that_is_rotated_under_load_loses_no_delivery(self):
        logs = []
        with Receiver(self.config()) as receiver, Senders(receiver.port, 4) as senders:
            for number in range(4):
                senders.wait_for_accepted(25)
                logs.append(self.log.with_suffix(f".{number}"))
                self.log.rename(logs[-1])
                receiver.process.send_signal(signal.SIGHUP)
                deadline_poll(
                    lambda: self.log.exists() and self.log.stat().st_size, message="no new log"
                )
            senders.finish()
            self.assertEqual(dict(senders.statuses), {200: len(senders.accepted)})
        ids = self.logged_ids(*logs, self.log)
        self.assertEqual(len(ids), len(set(ids)))
        self.assertEqual(set(ids), set(senders.accepted))

    def test_another_host_or_port_asks_for_a_restart_and_the_rest_is_swapped_in(self):
        with Receiver(self.config()) as receiver:
            for change in ({"port": 1}, {"host": "127.0.0.2"}):
                with self.subTest(change):
                    token = "token-with-another-" + "".join(change)
                    config = self.config(token=token)
                    config["webclient_info"].update(change)
                    receiver.write_config(config)
                    self.hang_up(receiver, r"(?i)restart")
                    self.wait_for_token(receiver, token)
                    self.assertEqual(receiver.deliver().status, 401)

    def test_a_burst_of_signals_harms_nothing(self):
        with Receiver(self.config()) as receiver, Senders(receiver.port, 2) as senders:
            for _ in range(50):
                receiver.process.send_signal(signal.SIGHUP)
            senders.wait_for_accepted(20)
            senders.finish()
            self.assertEqual(dict(senders.statuses), {200: len(senders.accepted)})
        self.assertEqual(sorted(self.logged_ids()), sorted(senders.accepted))


class Stop(LifeCase):
    """SIGTERM and SIGINT."""

    def test_a_stop_finishes_what_is_in_flight_and_takes_nothing_new(self):
        signals = (signal.SIGTERM, signal.SIGINT)
        with self.several(len(signals)) as started:
            for number, (receiver, log) in zip(signals, started):
                with self.subTest(number.name):
                    self.assert_finishes_what_is_in_flight(receiver, log, number)

    def assert_finishes_what_is_in_flight(self, receiver, log, number):
        with receiver.connect() as kept:
            kept.send(HEALTH)
            self.assertEqual(kept.read().status, 200)
            slow, last_byte, delivery_id = self.begin_request(receiver)
            receiver.process.send_signal(number)
            self.assert_refuses_connections(receiver.port)
            kept.send(HEALTH)
            self.assertEqual(kept.read().status, 503)
        self.assertIsNone(receiver.process.poll())
        slow.send(last_byte)
        answer = slow.read()
        self.assertEqual((answer.status, answer.json), (200, {"status": "ok"}))
        slow.socket.close()
        self.assertEqual(receiver.wait(5), 0)
        self.assertEqual(json.loads(receiver.stdout_lines[-1])["delivery_id"], delivery_id)
        self.assertEqual(self.logged_ids(log)[-1], delivery_id)
        self.assertNotIn("Traceback", "".join(receiver.stderr_lines))

    def test_a_second_signal_ends_it_at_once(self):
        signals = ((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT))
        with self.several(len(signals)) as started:
            for (first, second), (receiver, _) in zip(signals, started):
                with self.subTest(f"{first.name}, {second.name}"):
                    slow, _, _ = self.begin_request(receiver)
                    receiver.process.send_signal(first)
                    self.assert_refuses_connections(receiver.port)
                    self.assertIsNone(receiver.process.poll())
                    receiver.process.send_signal(second)
                    self.assertEqual(receiver.wait(3), 0)
                    self.assertTrue(slow.is_closed())
                    self.assertNotIn("Traceback", "".join(receiver.stderr_lines))

    def test_a_stop_waits_neither_for_idle_connections_nor_for_more_than_the_time_of_a_request(
        self,
    ):
        idle = Receiver(self.config(log_file="alerts.jsonl"))
        begun = Receiver(self.config(log_file="alerts.jsonl", request_timeout_seconds=0.3))
        with at_once(idle, begun):
            connections = [idle.connect() for _ in range(6)]
            for connection in connections:
                self.addCleanup(connection.socket.close)
            for connection in connections[
                :3
            ]:  # half of them between two requests, half before the first
                connection.send(HEALTH)
                self.assertEqual(connection.read().status, 200)
            slow, _, _ = self.begin_request(begun)  # it is never completed
            for receiver in (idle, begun):
                receiver.process.send_signal(signal.SIGTERM)
            self.assertEqual(slow.read().status, 408)
            slow.socket.close()
            self.assertEqual(begun.wait(5), 0)
            self.assertEqual(idle.wait(5), 0)
            for connection in connections:
                self.assertTrue(connection.is_closed())

    def test_a_stop_under_load_answers_all_that_it_keeps_and_keeps_all_that_it_answers(self):
        counts = (1, 12)
        with self.several(len(counts)) as started:
            for count, (receiver, log) in zip(counts, started):
                with self.subTest(senders=count):
                    with Senders(receiver.port, count, repeat=False) as senders:
                        senders.wait_for_accepted(10 * count)
                        self.assertEqual(receiver.stop(), 0)
                        senders.finish()
                    self.assertLessEqual(set(senders.statuses), {200, 503})
                    self.assertNotIn("timeout", senders.errors)
                    self.assertNotIn("TimeoutError", senders.errors)
                    self.assertEqual(sorted(self.logged_ids(log)), sorted(senders.accepted))
                    shown = [json.loads(line)["delivery_id"] for line in receiver.stdout_lines]
                    self.assertEqual(sorted(shown), sorted(senders.accepted))


@unittest.skipUnless(hasattr(socket, "AF_UNIX"), "there are no UNIX sockets here")
class Systemd(LifeCase):
    """What systemd is told, and the socket that it passes."""

    def messenger(self, address):
        """Listen where NOTIFY_SOCKET will point."""
        found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(found.close)
        found.bind(address)
        found.settimeout(10)
        return found

    def state(self, messenger):
        """Return the next message as a dict."""
        return dict(line.split("=", 1) for line in messenger.recv(4096).decode().splitlines())

    def test_the_service_manager_is_told_of_start_reload_and_stop(self):
        address = str(self.folder / "notify")
        messenger = self.messenger(address)
        with Receiver(self.config(), environment={"NOTIFY_SOCKET": address}) as receiver:
            self.assertEqual(self.state(messenger), {"READY": "1"})
            self.assertEqual(receiver.deliver().status, 200)
            for config in (
                self.config(token=NEW_TOKEN),
                "{",
            ):  # READY=1 is waited for after a failure too
                receiver.write_config(config)
                before = time.monotonic_ns() // 1000
                receiver.process.send_signal(signal.SIGHUP)
                state = self.state(messenger)
                self.assertEqual(state["RELOADING"], "1")
                if (
                    sys.platform == "linux"
                ):  # elsewhere the clock may differ from process to process
                    self.assertLessEqual(before, int(state["MONOTONIC_USEC"]))
                    self.assertLessEqual(int(state["MONOTONIC_USEC"]), time.monotonic_ns() // 1000)
                self.assertEqual(self.state(messenger), {"READY": "1"})
                self.assertEqual(receiver.deliver(token=NEW_TOKEN).status, 200)
            slow, last_byte, _ = self.begin_request(receiver, NEW_TOKEN)
            receiver.process.send_signal(signal.SIGTERM)
            self.assertEqual(self.state(messenger), {"STOPPING": "1"})
            self.assertIsNone(receiver.process.poll())
            slow.send(last_byte)
            self.assertEqual(slow.read().status, 200)
            slow.socket.close()
            self.assertEqual(receiver.wait(5), 0)

    @unittest.skipUnless(sys.platform == "linux", "there are no abstract names here")
    def test_the_notify_socket_may_have_an_abstract_name(self):
        name = f"central-webhook-test-{os.getpid()}"
        messenger = self.messenger("\0" + name)
        with Receiver(self.config(), environment={"NOTIFY_SOCKET": "@" + name}):
            self.assertEqual(self.state(messenger), {"READY": "1"})

    def test_nobody_at_the_notify_socket_is_no_reason_to_stop(self):
        with Receiver(
            self.config(), environment={"NOTIFY_SOCKET": str(self.folder / "nobody")}
        ) as receiver:
            self.assertEqual(receiver.deliver().status, 200)

    def inheriting(self, listener, **environment):
        """Start a receiver that inherits a listening socket."""
        script = self.folder / "pass-socket"
        script.write_text(PASS_SOCKET)
        script.chmod(0o700)
        environment = {"PYTHON": sys.executable, **environment}
        return Receiver(
            self.config(port=0), python=[script], environment=environment, stdin=listener
        )

    def listener(self):
        found = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.addCleanup(found.close)
        return found

    def test_a_restart_on_an_inherited_socket_refuses_no_connection(self):
        listener = self.listener()
        port = listener.getsockname()[1]
        with Senders(port, 6, repeat=False, keep_alive=False) as senders:
            for _ in range(2):
                with self.inheriting(listener) as receiver:
                    self.assertEqual(receiver.port, port)
                    senders.wait_for_accepted(30)
                    self.assertEqual(receiver.stop(), 0)
            with self.inheriting(listener):
                senders.wait_for_accepted(30)
                senders.finish()
        self.assertEqual(dict(senders.errors), {})
        self.assertEqual(dict(senders.statuses), {200: len(senders.accepted)})
        self.assertEqual(sorted(self.logged_ids()), sorted(senders.accepted))

    def test_a_socket_that_is_meant_for_another_process_is_not_used(self):
        listener = self.listener()
        with self.inheriting(listener, FOREIGN_PID="1") as receiver:
            self.assertNotEqual(receiver.port, listener.getsockname()[1])
            self.assertEqual(receiver.deliver().status, 200)


class ReloadedWebhooks(unittest.TestCase):
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
