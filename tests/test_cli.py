"""The command line: starts, --check-config, wrong usage, --help."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import central_webhook_client as product
from tests import support
from tests.support import (
    HARMFUL,
    TOKEN,
    TOP,
    Receiver,
    captured,
    central_headers,
    config_of,
    new_body,
    run_at_once,
)
from tests.test_config import SECRET, Called, hook, web

# ---- Starts that fail, and those that do not -------------------------------------------------


class Starts(Called):
    def assert_cannot_serve(self, cases):
        """Start a receiver for each name in `cases` with its configuration; each must end and say
        the name.
        """
        for name, (_, code, stdout, stderr) in zip(cases, self.run_with_each(*cases.values())):
            with self.subTest(name):
                self.assertEqual((code, stdout), (1, ""), stderr)
                self.assertRegex(stderr, r"\Acentral_webhook_client\.py: error: .+\n\Z")
                self.assertIn(name, stderr)

    def test_a_port_that_is_taken(self):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            self.assert_cannot_serve({str(port): config_of(port=port)})

    def test_an_address_of_another_machine(self):
        self.assert_cannot_serve({"webclient_info.host: 192.0.2.77": config_of(host="192.0.2.77")})

    def test_an_ipv6_address(self):
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            self.skipTest("there is no IPv6 here")
        with Receiver(web(host="::1")) as receiver:
            with socket.create_connection(("::1", receiver.port), timeout=10) as connection:
                connection.sendall(
                    b"GET /health HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n"
                )
                self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 200 "))


class Started(Called):
    """One receiver whose configuration is right and unusual: what can be seen of it from
    outside.
    """

    @classmethod
    def setUpClass(cls):
        cls.working, credentials = (Path(tempfile.mkdtemp(prefix="elsewhere-")) for _ in range(2))
        for folder in (cls.working, credentials):
            cls.addClassCleanup(shutil.rmtree, folder)
        (credentials / "central").write_text("token-new\ntoken-old\n")
        (credentials / "central").chmod(0o600)
        webhooks = [
            {"name": "first", "path": "/first", "token": TOKEN},
            {"name": "second", "type": "ip-fabric", "token": TOKEN},
            {"name": "third", "path": "/third", "token_file": "${CREDENTIALS_DIRECTORY}/central"},
        ]
        cls.receiver = Receiver(
            config_of(host="localhost", port="0", webhook=webhooks, log_file="alerts.log"),
            environment={"CREDENTIALS_DIRECTORY": str(credentials)},
            cwd=cls.working,
        ).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def status(self, path, token):
        body = new_body()
        return self.receiver.post(body, central_headers(body, token=token), path).status

    def start_line(self):
        """Return the one line that says where it listens."""
        (line,) = [line for line in self.receiver.stderr_lines if str(self.receiver.port) in line]
        return line

    def test_the_start_line_names_version_address_webhooks_and_outputs(self):
        line = self.start_line()
        _, version, _ = self.call("--version")
        for text in (
            version.split()[-1],
            "127.0.0.1",
            "first",
            "second",
            "ip-fabric",
            "/first",
            "stdout",
            "alerts.log",
        ):
            with self.subTest(text):
                self.assertIn(text, line)

    def test_a_port_may_be_a_string_and_localhost_is_127_0_0_1(self):
        self.assertEqual(self.status("/first", TOKEN), 200)
        self.assertRegex(self.start_line(), r"127\.0\.0\.1")

    def test_paths_are_relative_to_the_configuration_file_and_not_to_the_working_directory(self):
        self.assertEqual(self.status("/first", TOKEN), 200)
        self.assertTrue((self.receiver.folder / "alerts.log").read_text().endswith("\n"))
        self.assertEqual(list(self.working.iterdir()), [])

    def test_the_tokens_of_a_file_are_those_that_verify(self):
        for token, status in (
            ("token-new", 200),
            ("token-old", 200),
            ("token-new\n", 401),
            ("token", 401),
        ):
            with self.subTest(token):
                self.assertEqual(self.status("/third", token), status)


class CheckConfig(Called):
    def test_it_says_one_line_a_webhook_and_exits_with_0(self):
        names = ("noc", "fabric", "new", "bracken", "entrupy")
        webhooks = [
            {
                "name": "noc",
                "token": [SECRET, SECRET + "2"],
                "api_key": {"header": "X-Key", "value": SECRET},
            },
            {"name": "fabric", "type": "ip-fabric", "path": "/fabric", "token": SECRET},
            {
                "name": "new",
                "type": "new-central",
                "token": SECRET,
                "public_url": "https://a.example/b",
            },
            {"name": "bracken", "type": "bracken", "token": SECRET},
            {"name": "entrupy", "type": "entrupy", "token": SECRET},
        ]
        self.write(config_of(webhook=webhooks))
        file = ("-i", self.path)
        for code, stdout, stderr in self.run_at_once([*file, "--check-config"], [*file, "-t"]):
            self.assertEqual((code, stderr), (0, ""))
            lines = stdout.splitlines()
            self.assertEqual(len(lines), 7)
            self.assertEqual("host: 127.0.0.1; port: 0", lines[0])
            self.assertIn("a 200 is only as safe as what reads stdout", lines[1])
            for name, line in zip(names, lines[2:]):
                self.assertTrue(line.startswith(name), line)
            self.assertIn("body not protected", lines[4])

    def test_it_binds_nothing_and_makes_no_file(self):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            config = config_of(port=other.getsockname()[1], log_file="alerts.log")
            code, stdout, _ = self.check(config)
        self.assertEqual(code, 0)
        self.assertIn(f"log_file: {self.folder / 'alerts.log'}\n", stdout)
        self.assertEqual(list(self.folder.iterdir()), [self.path])

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs a file that is always full")
    def test_what_it_cannot_print_is_an_error(self):
        self.write(config_of())
        command = [sys.executable, support.PROGRAM, "-t", f"-i={self.path}"]
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, env={}
            )
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\A\S+: error: stdout: .+\n\Z")

    def test_it_changes_nothing_of_a_log_that_a_receiver_writes(self):
        with Receiver(web(log_file="alerts.log")) as receiver:
            self.assertEqual(receiver.deliver().status, 200)
            log = receiver.folder / "alerts.log"
            before = log.read_bytes()
            path = str(receiver.config_path)
            self.assertEqual(self.call("-i", path, "--check-config")[0], 0)
            self.assertEqual(log.read_bytes(), before)

    def test_it_fails_where_the_start_would(self):
        (self.folder / "directory").mkdir()
        os.mkfifo(self.folder / "pipe")
        key = "webclient_info.log_file"
        for config, said in (
            (
                web(log_file="missing/alerts.log"),
                f"{key}: {self.folder / 'missing/alerts.log'}: No",
            ),
            (web(log_file="directory"), f"{key}: {self.folder / 'directory'}: Is a directory"),
            (web(log_file="pipe"), f"{key}: {self.folder / 'pipe'}: not a regular file"),
            (web(host="192.0.2.1"), "webclient_info.host: 192.0.2.1 "),
        ):
            with self.subTest(said):
                self.write(config)
                file = f"-i={self.path}"
                for code, _, stderr in self.run_at_once([file, "-t"], [file]):
                    self.assertEqual(code, 1)
                    if "host" not in said:
                        self.assertIn(f"error: {said}", stderr)
                    self.assertEqual(stderr.count("\n"), 1, stderr)
        self.assertFalse((self.folder / "missing").exists())

    def test_the_example_is_valid_but_for_its_placeholders(self):
        example = (TOP / "input_info.json.example").read_text(encoding="utf-8")
        for line in self.mistakes(example):
            self.assertIn("placeholder", line)
        config = json.loads(example)
        webhooks = config["central_info"]["webhook"]
        for webhook in webhooks if isinstance(webhooks, list) else [webhooks]:
            webhook["token"] = SECRET
        self.assertEqual(self.check(config)[0], 0)


class Usage(Called):
    def test_wrong_usage_is_exit_code_2(self):
        self.write(hook())
        several = config_of(
            webhook=[{"name": "a", "token": SECRET}, {"name": "b", "type": "mist", "token": SECRET}]
        )
        (self.folder / "several.json").write_text(json.dumps(several))
        for arguments in (
            [],
            ["-i"],
            ["--check-config"],
            ["--send-sample"],
            [f"-i={self.path}", "--nonsense"],
            [f"-i={self.path}", "nonsense"],
            [f"-i={self.path}", "--format", "xml"],
            [f"-i={self.path}", "--format"],
            [f"-i={self.path}", "--check-config", "--send-sample"],
            [f"-i={self.path}", "--send-sample", "http://127.0.0.1:9/", "--webhook", "missing"],
            [f"-i={self.path}", "--send-sample", "http://127.0.0.1:9/", "--header", "no colon"],
            [f"-i={self.folder / 'several.json'}", "--send-sample", "http://127.0.0.1:9/"],
        ):
            with self.subTest(arguments):
                code, stdout, stderr = self.call(*arguments)
                self.assertEqual((code, stdout), (2, ""), stderr)
                self.assertIn("central_webhook_client.py: error: ", stderr.splitlines()[-1])

    def test_a_process_exits_with_2_as_well(self):
        ((code, stdout, stderr),) = self.run_at_once([])
        self.assertEqual((code, stdout), (2, ""))
        self.assertIn("central_webhook_client.py: error: ", stderr)

    def test_the_file_is_given_in_any_of_the_usual_ways(self):
        self.write(hook())
        path = str(self.path)
        for arguments in (
            ["-i", path],
            [f"-i={path}"],
            [f"-i{path}"],
            ["--input", path],
            [f"--input={path}"],
        ):
            with self.subTest(arguments):
                self.assertEqual(self.call(*arguments, "--check-config")[0], 0)

    def test_help_and_version(self):
        for option in ("-h", "--help"):
            code, stdout, stderr = self.call(option)
            self.assertEqual((code, stderr), (0, ""))
            for name in (
                "--input",
                "--check-config",
                "--send-sample",
                "--demo",
                "--format",
                "--verbose",
                "--version",
            ):
                self.assertIn(name, stdout)
        code, stdout, stderr = self.call("--version")
        self.assertEqual((code, stderr), (0, ""))
        self.assertRegex(stdout, r"\d+\.\d+")


class Demo(unittest.TestCase):
    def test_it_shows_accepted_alerts_and_a_refused_one(self):
        runs = [["--demo"], ["--demo", "--format", "pretty"]]
        for run, pretty, (code, stdout, stderr) in zip(runs, (False, True), run_at_once(*runs)):
            with self.subTest(run):
                self.assertEqual(code, 0, stderr)
                self.assertNotIn("Traceback", stderr)
                self.assertIn("200", stderr)
                self.assertRegex(stderr, r"(?i)forged.*401")
                if pretty:
                    self.assertNotIn('"received_at"', stdout)
                    self.assertRegex(stdout.splitlines()[0], r"\A\d{4}-\d\d-\d\d .*demo")
                else:
                    alerts = [json.loads(line) for line in stdout.splitlines()]
                    self.assertGreaterEqual(len(alerts), 2)
                    for alert in alerts:
                        self.assertEqual((alert["webhook"], alert["type"]), ("demo", "central"))
                        self.assertIsInstance(alert["alert"], dict)

    def demo_with(self, handle_alert):
        """Run the demo of a program whose `handle_alert` is this expression."""
        code = "import sys, central_webhook_client as c"
        code += f"; c.handle_alert = {handle_alert}; sys.exit(c.main(['--demo']))"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=support.TOP, capture_output=True, text=True, timeout=30)

    def test_it_leaves_handle_alert_alone(self):
        done = self.demo_with("print")
        self.assertEqual(done.returncode, 0)
        self.assertIn("forged", done.stderr)
        self.assertNotIn("Delivery(", done.stdout)

    def test_a_handle_alert_that_the_start_would_refuse_is_refused(self):
        done = self.demo_with("5")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("error: handle_alert: ", done.stderr)


class SendSample(unittest.TestCase):
    WEBHOOKS = [
        support.hook("central"),
        support.hook("old", token=["first", "second"]),
        support.hook("fabric", type="ip-fabric"),
        support.hook("bracken", type="bracken"),
        support.hook("entrupy", type="entrupy"),
        support.hook("new", type="new-central", public_url="https://a.example:8443/new?x=y"),
        support.hook("header", api_key={"header": "X-Key", "value": ["K1", "K2"]}),
        support.hook("field", api_key={"field": "apiKey", "value": "K3"}),
    ]

    @classmethod
    def setUpClass(cls):
        cls.receiver = Receiver(config_of(webhook=cls.WEBHOOKS)).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def url(self, path):
        return f"http://127.0.0.1:{self.receiver.port}{path}"

    def call(self, *arguments, config=None):
        """Return exit code, stdout and stderr of main() with --send-sample."""
        path = self.receiver.folder / "sender.json"
        path.write_text(json.dumps(config or config_of(self.receiver.port, self.WEBHOOKS)))
        path.chmod(0o600)
        with captured(sys.stdout, 1) as stdout, captured(sys.stderr, 2) as stderr:
            code = product.main(["-i", str(path), "--send-sample", *arguments])
            texts = stdout(), stderr()
        self.assertNotIn(TOKEN, "".join(texts))
        return code, *texts

    def test_a_sample_of_every_type_is_accepted_at_the_configured_address(self):
        for webhook in self.WEBHOOKS:
            name = webhook["name"]
            with self.subTest(name):
                before = len(self.receiver.stdout_lines)
                code, stdout, stderr = self.call("--webhook", name)
                self.assertEqual((code, stderr), (0, ""))
                self.assertRegex(stdout, r'\b200\b.*"ok".*\d+.*\n')
                line = self.receiver.wait_for_stdout(before + 1)[-1]
                found = json.loads(line)
                self.assertEqual(
                    (found["webhook"], found["type"]), (name, webhook.get("type", "central"))
                )
                self.assertIsInstance(found["alert"], dict)
                self.assertNotIn("K3", line)

    def test_two_samples_are_two_deliveries(self):
        for name in ("central", "fabric", "new"):
            for _ in range(2):
                code, stdout, _ = self.call("--webhook", name)
                self.assertEqual(code, 0)
                self.assertIn('"ok"', stdout)
                time.sleep(0.002)

    def test_a_url_can_be_given(self):
        code, stdout, _ = self.call(self.url("/central"), "--webhook", "central")
        self.assertEqual(code, 0)
        self.assertIn("200", stdout)
        code, stdout, stderr = self.call(self.url("/other"), "--webhook", "central")
        self.assertEqual(code, 1)
        self.assertIn("404", stdout + stderr)

    def test_a_token_that_does_not_match_is_exit_code_1(self):
        config = config_of(self.receiver.port, {"path": "/central", "token": "another"})
        code, stdout, stderr = self.call(config=config)
        self.assertEqual(code, 1)
        self.assertIn("401", stdout + stderr)

    def test_a_header_can_be_added(self):
        webhook = {"name": "x", "path": "/header", "token": TOKEN}
        config = config_of(self.receiver.port, webhook)
        self.assertEqual(self.call(config=config)[0], 1)
        self.assertEqual(self.call("--header", "X-Key: K2", config=config)[0], 0)
        self.assertEqual(
            self.call("--header", "X-Other: 1", "--header", "x-key:Bearer K2", config=config)[0], 0
        )
        self.assertEqual(self.call("--header", "X-Key: K3", config=config)[0], 1)

    def test_a_url_that_is_none_is_wrong_usage(self):
        for url in ("ftp://a/", "a", "http://user:secret@127.0.0.1/", "http://127.0.0.1:99999/"):
            with self.subTest(url):
                code, stdout, stderr = self.call(url, "--webhook", "central")
                self.assertEqual((code, stdout, stderr.count("\n")), (2, "", 1))
                self.assertNotIn("secret", stderr)

    def test_without_a_server_it_is_one_line_and_exit_code_1(self):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it
            port = unused.getsockname()[1]
            path = self.receiver.folder / "nobody.json"
            path.write_text(json.dumps(config_of(port)))
            path.chmod(0o600)
            ((code, stdout, stderr),) = run_at_once([f"-i={path}", "--send-sample"])
        self.assertEqual((code, stdout), (1, ""))
        self.assertRegex(stderr, rf"\Acentral_webhook_client\.py: error: .*{port}.*\n\Z")

    def test_a_process_says_status_answer_and_time(self):
        path = self.receiver.folder / "one.json"
        path.write_text(json.dumps(config_of(self.receiver.port, self.WEBHOOKS[0])))
        path.chmod(0o600)
        ((code, stdout, stderr),) = run_at_once(["-i", path, "--send-sample"])
        self.assertEqual((code, stderr), (0, ""))
        self.assertRegex(stdout, r'\A.*200.*"status": "ok".*\d+.*\n\Z')

    def test_an_answer_of_the_server_cannot_move_the_cursor(self):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()

            def answer():
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(10)
                    while b"\r\n\r\n" not in connection.recv(65536):
                        pass
                    text = "\x1b[2J\u202e\r\n\x9b".encode()
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text
                    )

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            code, stdout, _ = self.call(
                f"http://127.0.0.1:{server.getsockname()[1]}/", "--webhook", "central"
            )
            thread.join(10)
        self.assertEqual(code, 0)
        self.assertNotRegex(stdout, HARMFUL)
        self.assertEqual(stdout.count("\n"), 1)
