"""The life of a receiver: reload, stop, systemd, all of it in the middle of traffic."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import unittest

from tests.support import (
    DUPLICATE,
    HEALTH,
    OK,
    PATH,
    TOKEN,
    LogTest,
    Receiver,
    Senders,
    at_once,
    central_headers,
    config_of,
    deadline_poll,
    hook,
    ids_of,
    is_refused,
    new_body,
    raw_request,
    signed,
)

NEW_TOKEN = "token-after-the-rotation"

# The socket comes as standard input, since a shell can name that descriptor; systemd passes 3.
PASS_SOCKET = """
exec 3<&0 </dev/null
export LISTEN_FDS=1 LISTEN_PID=${FOREIGN_PID:-$$}
exec "$PYTHON" "$@"
"""


class LifeTest(LogTest):
    def with_token(self, token, **webclient_info):
        """Return a configuration whose one webhook has this token."""
        return self.config({"name": "noc", "path": PATH, "token": token}, **webclient_info)

    @contextlib.contextmanager
    def several(self, *configs):
        """Start receivers with logs of their own, all at once; give them with their logs."""
        made = [Receiver(config_of(log_file="alerts.jsonl", **config)) for config in configs]
        with at_once(*made):
            yield [(receiver, receiver.folder / "alerts.jsonl") for receiver in made]

    def begin_request(self, receiver, token=TOKEN):
        """Send a delivery but for its last byte; return connection, last byte, delivery ID."""
        body = new_body()
        headers = central_headers(body, token)
        request = raw_request(headers=headers, body=body)
        deadline_poll(lambda: receiver.in_flight() == 0)  # those before may be ending
        connection = receiver.connect()
        self.addCleanup(connection.socket.close)
        connection.send(request[:-1])
        deadline_poll(lambda: receiver.in_flight() == 1, message="it never began")
        return connection, request[-1:], headers["X-Central-Delivery-ID"]


@unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP")
class Reload(LifeTest):
    """SIGHUP."""

    def test_a_token_is_rotated_under_load_without_a_single_refusal(self):
        with self.started() as receiver, Senders(receiver.port, 4) as senders:
            senders.wait_for_accepted(20)
            self.assertEqual(receiver.deliver(token=NEW_TOKEN).status, 401)
            receiver.reload(self.with_token([NEW_TOKEN, TOKEN]), "configuration reloaded")
            self.assertEqual(receiver.deliver(token=NEW_TOKEN).status, 200)
            senders.change_token(NEW_TOKEN)
            senders.wait_for_accepted(20)
            receiver.reload(self.with_token(NEW_TOKEN), "configuration reloaded")
            self.assertEqual(receiver.deliver().status, 401)
            senders.wait_for_accepted(20)
            senders.finish()
            self.assertEqual(dict(senders.statuses), {200: len(senders.accepted)})
            self.assertEqual(dict(senders.errors), {})
        ids = ids_of(self.read_log())
        self.assertEqual(len(ids), len(set(ids)))
        self.assertLessEqual(set(senders.accepted), set(ids))

    def test_a_broken_configuration_keeps_the_old_one_whole_and_logs_the_error(self):
        changed, a = self.with_token(NEW_TOKEN), hook("a")
        nameless = [{"type": "x", "token": "t"}, {"type": "x", "token": "t"}, a, a]
        os.mkfifo(self.folder / "fifo")
        with self.started() as receiver:
            cases = [  # configuration, what the error names
                ("{", "input_info.json"),
                ("", "input_info.json"),
                ({**changed, "extra": 1}, "extra"),
                (config_of(port=65536), r"webclient_info\.port"),
                ({**changed, "central_info": {"webhook": []}}, "webhook"),
                (config_of(webhook=nameless), "not reloaded.*webhook"),
                (self.with_token(NEW_TOKEN, log_file="missing/a.jsonl"), r"missing.a\.jsonl"),
                (self.with_token(NEW_TOKEN, log_file=str(self.folder / "fifo")), "not a regular"),
                (None, "input_info.json"),
            ]
            for count, (config, named) in enumerate(cases, 1):
                with self.subTest(config):
                    if config is None:
                        receiver.config_path.unlink()
                    receiver.reload(config, rf" ERROR .*{named}")
                    self.assertEqual(receiver.deliver().status, 200)
                    self.assertEqual(receiver.deliver(token=NEW_TOKEN).status, 401)
                    self.assertEqual(len(self.read_log()), count)
            receiver.reload(changed, "configuration reloaded")
            self.assertEqual(receiver.deliver(token=NEW_TOKEN).status, 200)

    def test_webhooks_limits_and_the_log_change_and_no_delivery_is_forgotten(self):
        noc, lab = hook("noc"), hook("lab")
        body, headers = signed()
        large = new_body(filler="x" * 600)
        with Receiver(config_of(webhook=[noc])) as receiver:
            self.assertEqual(receiver.post(body, headers, "/noc").json, OK)
            self.assertEqual(receiver.post(body, headers, "/lab").status, 404)
            receiver.reload(self.config([lab, noc], max_body_bytes=500))
            self.assertEqual(receiver.post(body, headers, "/noc").json, DUPLICATE)
            self.assertEqual(receiver.post(body, headers, "/lab").json, OK)
            self.assertEqual(receiver.post(large, central_headers(large), "/lab").status, 413)
            self.assertEqual(len(self.read_log()), 1)
            receiver.reload(config_of(webhook=[lab]))
            self.assertEqual(receiver.post(body, headers, "/noc").status, 404)
            self.assertEqual(receiver.post(body, headers, "/lab").json, DUPLICATE)
            self.assertNotIn("restart", "\n".join(receiver.stderr_lines).lower())

    def test_another_host_or_port_asks_for_a_restart_and_the_rest_changes(self):
        with self.started() as receiver:
            for change in ({"port": 1}, {"host": "127.0.0.2"}):
                with self.subTest(change):
                    token = "token-with-another-" + "".join(change)
                    config = self.with_token(token)
                    config["webclient_info"].update(change)
                    receiver.reload(config, "(?i)restart")
                    deadline_poll(lambda token=token: receiver.deliver(token=token).status == 200)
                    self.assertEqual(receiver.deliver().status, 401)

    def test_a_log_that_was_moved_is_opened_again(self):
        with self.started() as receiver:
            self.log.rename(self.folder / "old")
            receiver.reload(pattern="configuration reloaded")
            self.assertTrue(self.log.exists())

    def test_a_burst_of_signals_harms_nothing(self):
        with self.started() as receiver, Senders(receiver.port, 2) as senders:
            for _ in range(200):
                receiver.process.send_signal(signal.SIGHUP)
                senders.wait_for_accepted(3)
            senders.finish()
            self.assertEqual(dict(senders.statuses), {200: len(senders.accepted)})
        self.assertEqual(sorted(ids_of(self.read_log())), sorted(senders.accepted))

    def test_a_configuration_that_takes_long_to_read_delays_no_delivery(self):
        with Receiver() as receiver:
            pipe = receiver.folder / "tokens"
            os.mkfifo(pipe, 0o600)
            webhook = {"name": "noc", "path": PATH, "token_file": "tokens"}
            receiver.write_config(config_of(receiver.port, webhook))
            receiver.process.send_signal(signal.SIGHUP)
            with open(pipe, "w") as tokens:  # waits until the receiver has opened it as well
                self.assertEqual(receiver.health(), 200)
                self.assertEqual(receiver.deliver().status, 200)
                tokens.write("another-token\n")
            receiver.wait_for_log("configuration reloaded")
            self.assertEqual(receiver.deliver().status, 401)
            self.assertEqual(receiver.deliver(token="another-token").status, 200)

    def test_a_reload_after_a_stop_does_nothing(self):
        with Receiver(config_of(request_timeout_seconds=5)) as receiver:
            slow, last_byte, _ = self.begin_request(receiver)
            receiver.process.terminate()
            deadline_poll(lambda: is_refused(receiver.port))
            receiver.process.send_signal(signal.SIGHUP)
            slow.send(last_byte)
            self.assertEqual(slow.read().status, 200)
            slow.socket.close()
            self.assertEqual(receiver.wait(), 0)
        self.assertNotIn("reloaded", "\n".join(receiver.stderr_lines))


class Stop(LifeTest):
    """SIGTERM and SIGINT."""

    def test_a_stop_finishes_what_is_in_flight_and_takes_nothing_new(self):
        signals = (signal.SIGTERM, signal.SIGINT)
        with self.several({}, {}) as started:
            for number, (receiver, log) in zip(signals, started):
                with self.subTest(number.name), receiver.connect() as kept:
                    kept.send(HEALTH)
                    self.assertEqual(kept.read().status, 200)
                    slow, last_byte, delivery_id = self.begin_request(receiver)
                    receiver.process.send_signal(number)
                    deadline_poll(lambda port=receiver.port: is_refused(port))
                    kept.send(HEALTH)
                    self.assertEqual(kept.read().status, 503)
                    kept.socket.close()
                    self.assertIsNone(receiver.process.poll())
                    slow.send(last_byte)
                    self.assertEqual(slow.read().json, OK)
                    slow.socket.close()
                    self.assertEqual(receiver.wait(), 0)
                    shown = [json.loads(line)["delivery_id"] for line in receiver.stdout_lines]
                    self.assertEqual(shown, [delivery_id])
                    self.assertEqual(ids_of(self.read_log(log)), [delivery_id])
                    self.assertNotIn("Traceback", "".join(receiver.stderr_lines))

    def test_a_second_signal_ends_it_at_once(self):
        signals = (signal.SIGTERM, signal.SIGINT)
        with self.several({}, {}) as started:
            for number, (receiver, _) in zip(signals, started):
                with self.subTest(number.name):
                    slow, _, _ = self.begin_request(receiver)
                    receiver.process.send_signal(number)
                    deadline_poll(lambda port=receiver.port: is_refused(port))
                    self.assertIsNone(receiver.process.poll())
                    self.assertEqual(receiver.stop(number, 5), 0)
                    self.assertTrue(slow.is_closed())
                    self.assertNotIn("Traceback", "".join(receiver.stderr_lines))

    def test_a_stop_waits_neither_for_idle_connections_nor_beyond_the_request_timeout(self):
        with self.several({}, {"request_timeout_seconds": 0.6}) as ((idle, _), (begun, _)):
            connections = [idle.connect() for _ in range(6)]
            for connection in connections[:3]:  # between two requests; the others before the first
                connection.send(HEALTH)
                self.assertEqual(connection.read().status, 200)
            slow, _, _ = self.begin_request(begun)  # never completed
            for receiver in (idle, begun):
                receiver.process.terminate()
            self.assertEqual(slow.read().status, 408)
            slow.socket.close()
            self.assertEqual(begun.wait(), 0)
            self.assertEqual(idle.wait(), 0)
            for connection in connections:
                self.assertTrue(connection.is_closed())
                connection.socket.close()

    def test_a_stream_of_new_connections_does_not_delay_a_stop(self):
        with self.started(max_connections=2) as receiver:
            address = ("127.0.0.1", receiver.port)
            has_ended = threading.Event()

            def connect_again_and_again():
                while not has_ended.is_set():
                    with contextlib.suppress(OSError):
                        with socket.create_connection(address, 5) as connection:
                            connection.sendall(HEALTH)
                            connection.recv(1000)

            threads = [threading.Thread(target=connect_again_and_again) for _ in range(20)]
            for thread in threads:
                thread.start()
            deadline_poll(lambda: receiver.in_flight() == 1)
            receiver.process.terminate()
            try:
                self.assertEqual(receiver.wait(9), 0)
            finally:
                has_ended.set()
                for thread in threads:
                    thread.join()

    def test_after_a_stop_under_load_answers_stdout_and_log_agree(self):
        counts = (1, 12)
        with self.several({}, {}) as started:
            for count, (receiver, log) in zip(counts, started):
                with self.subTest(senders=count):
                    with Senders(receiver.port, count, repeat=False) as senders:
                        senders.wait_for_accepted(10 * count)
                        self.assertEqual(receiver.stop(), 0)
                        senders.finish()
                    self.assertLessEqual(set(senders.statuses), {200, 503})
                    self.assertTrue({"timeout", "TimeoutError"}.isdisjoint(senders.errors))
                    accepted = sorted(senders.accepted)
                    self.assertEqual(sorted(ids_of(self.read_log(log))), accepted)
                    shown = [json.loads(line)["delivery_id"] for line in receiver.stdout_lines]
                    self.assertEqual(sorted(shown), accepted)


@unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs UNIX sockets")
class Systemd(LifeTest):
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
            for config in (self.with_token(NEW_TOKEN), "{"):  # READY=1 after a failure too
                receiver.write_config(config)
                before = time.monotonic_ns() // 1000
                receiver.process.send_signal(signal.SIGHUP)
                state = self.state(messenger)
                self.assertEqual(state["RELOADING"], "1")
                if sys.platform == "linux":  # elsewhere the clock may differ between processes
                    self.assertLessEqual(before, int(state["MONOTONIC_USEC"]))
                    self.assertLessEqual(int(state["MONOTONIC_USEC"]), time.monotonic_ns() // 1000)
                self.assertEqual(self.state(messenger), {"READY": "1"})
                self.assertEqual(receiver.deliver(token=NEW_TOKEN).status, 200)
            slow, last_byte, _ = self.begin_request(receiver, NEW_TOKEN)
            receiver.process.terminate()
            self.assertEqual(self.state(messenger), {"STOPPING": "1"})
            self.assertIsNone(receiver.process.poll())
            slow.send(last_byte)
            self.assertEqual(slow.read().status, 200)
            slow.socket.close()
            self.assertEqual(receiver.wait(), 0)

    @unittest.skipUnless(sys.platform == "linux", "needs abstract names")
    def test_the_notify_socket_may_have_an_abstract_name(self):
        name = f"central-webhook-test-{os.getpid()}"
        messenger = self.messenger("\0" + name)
        with Receiver(self.config(), environment={"NOTIFY_SOCKET": "@" + name}):
            self.assertEqual(self.state(messenger), {"READY": "1"})

    def test_a_notify_socket_without_a_listener_does_not_stop_it(self):
        environment = {"NOTIFY_SOCKET": str(self.folder / "nobody")}
        with Receiver(self.config(), environment=environment) as receiver:
            self.assertEqual(receiver.deliver().status, 200)

    def inheriting(self, listener, **environment):
        """Return a receiver that inherits a listening socket, still to be entered."""
        environment = {"PYTHON": sys.executable, **environment}
        python = [self.script(PASS_SOCKET)]
        return Receiver(self.config(), python=python, environment=environment, stdin=listener)

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
        self.assertEqual(sorted(ids_of(self.read_log())), sorted(senders.accepted))

    def test_a_socket_that_is_meant_for_another_process_is_not_used(self):
        listener = self.listener()
        with self.inheriting(listener, FOREIGN_PID="1") as receiver:
            self.assertNotEqual(receiver.port, listener.getsockname()[1])
            self.assertEqual(receiver.deliver().status, 200)
