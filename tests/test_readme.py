"""README.md, --help, the example and the code agree; what README.md shows is what comes back."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path

import central_webhook_client as client

from .support import (
    PATH,
    PROGRAM,
    TOKEN,
    TOP,
    Receiver,
    config_of,
    deadline_poll,
    new_body,
    raw_request,
    run_at_once,
)

README = TOP / "README.md"
EXAMPLE = TOP / "input_info.json.example"
NGINX = TOP / "nginx" / "centralwebhook.conf"
PLACEHOLDER = "expected a secret or an array of secrets, found a placeholder"
SOURCE = PROGRAM.read_text(encoding="utf-8")
TEXT = README.read_text(encoding="utf-8")

# Every command of README.md by how it begins: the test below tests/ that executes it.
EXECUTED = {
    "python3 central_webhook_client.py --demo\n": (
        "test_readme.FirstScreenTest.test_the_demo_prints_what_is_shown"
    ),
    "(umask 077; cp": "test_readme.FirstScreenTest.test_the_installed_receiver_says_what_is_shown",
    "{ echo": "test_readme.SnippetTest.test_the_copied_section_verifies_on_its_own",
    "grep": "test_readme.ReferenceTest.test_the_security_comments_are_found_as_shown",
    "sudo cp": "interop.test_readme.NginxTest.test_a_sample_goes_through_nginx_as_installed",
    "curl -s http://127.0.0.1:8010/health": (
        "interop.test_readme.MonitoringTest.test_curl_gets_the_health_and_the_metrics"
    ),
    "curl -s http://127.0.0.1:8010/metrics": (
        "interop.test_readme.MonitoringTest.test_curl_gets_the_health_and_the_metrics"
    ),
    "git pull": "interop.test_readme.UpgradeTest.test_a_new_version_is_tried_before_the_restart",
    "python3 central_webhook_client.py --demo &&": (
        "interop.test_readme.UpgradeTest.test_a_new_version_is_tried_before_the_restart"
    ),
    "python3 my_receiver.py": (
        "interop.test_recipes.OwnCodeTest.test_a_program_of_ones_own_takes_the_place_of_the_receiver"
    ),
    "tail -n 0 -F": (
        "interop.test_recipes.WatchTest."
        "test_jq_shows_critical_alerts_and_goes_on_after_what_it_cannot_read"
    ),
}
NOT_EXECUTED = {  # and why
    "sudo setsebool": "needs a kernel with SELinux",
    "certbot": "needs a public name",
    "sudo systemctl daemon-reload": "needs systemd as PID 1; test_systemd.py checks the units",
    "adduser": "changes the machine",
    "pip install": "installs; interop/test_dashboard.py runs the last line, and dashboard.py",
    "sudo install": "needs a container engine; interop/test_recipes.py compares it with compose",
    "python3 -m tests.benchmark": "takes minutes",
    "python3 -m unittest": "is what runs this test; interop/test_recipes.py runs that of own code",
}
PROGRAMS = "adduser|certbot|curl|git|grep|python3|sudo"  # what begins a command within a text


def section(title, text=TEXT):
    """Return the text of one section of README.md; "" is the first screen."""
    parts = re.split(r"(?m)^## (.+)\n", text)
    return dict(zip(["", *parts[1::2]], parts[0::2]))[title]


def blocks(language, text=TEXT):
    """Return the code blocks of a language, without their indentation."""
    found = re.findall(rf"(?ms)^( *)```{language}\n(.*?)^\1```$", text)
    return [textwrap.dedent(code) for _, code in found]


def block(language, start, text=TEXT):
    """Return the one block that begins so."""
    (found,) = [code for code in blocks(language, text) if code.startswith(start)]
    return found


def inline_commands(text=TEXT):
    """Return the commands that stand within the text, between backticks."""
    without_blocks = re.sub(r"(?ms)^( *)```.*?^\1```$", "", text)
    return re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", without_blocks)


def table(first_cell, text=TEXT):
    """Return the rows below the header whose first cell is this one."""
    lines = text.split("\n")
    (start,) = [n for n, line in enumerate(lines) if line.startswith(f"| {first_cell} |")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line[1:-1].split("|")])
    return rows


def code_of(cell):
    """Return what stands between backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def without_moments(text):
    """Return a text without what differs from run to run: times and ports."""
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?", "TIME", text)
    return re.sub(r"(127\.0\.0\.1:| port )\d+", r"\1PORT", text)


def write_program(path, code):
    """Write a Python script that takes the place of another program on the PATH."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)


class FirstScreenTest(unittest.TestCase):
    """What a reader tries first."""

    def test_the_demo_prints_what_is_shown(self):
        (shown,) = blocks("text", section(""))
        self.assertIn("python3 central_webhook_client.py --demo\n", blocks("sh", section("")))
        done = subprocess.run(
            [sys.executable, str(PROGRAM), "--demo", "--format=pretty"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=30,
            env={**os.environ, "PYTHONUTF8": "1"},
        )
        self.assertEqual(0, done.returncode)
        pattern = ""
        for line in without_moments(shown).splitlines():
            pattern += r"(?:.*\n)+?" if line.strip() == "..." else re.escape(line) + r",?\n"
        self.assertRegex(without_moments(done.stdout.decode()), rf"\A{pattern}\Z")

    @unittest.skipUnless(os.name == "posix", "needs sh")
    def test_the_installed_receiver_says_what_is_shown(self):
        commands = block("sh", "(umask 077; cp", section(""))
        (shown,) = re.findall("`(listens on .*?)`", section(""))
        with tempfile.TemporaryDirectory(prefix="readme-") as name:
            folder, stderr = Path(name), Path(name, "stderr")
            shutil.copy(PROGRAM, folder)
            shutil.copy(EXAMPLE, folder)
            # The editor of this test fills in the token, and takes a port that is free.
            write_program(
                folder / "bin" / "editor",
                "import pathlib, re, sys\n"
                "path = pathlib.Path(sys.argv[1])\n"
                f"text = re.sub('<.+>', {TOKEN!r}, path.read_text())\n"
                "path.write_text(text.replace('8010', '0'))\n",
            )
            (folder / "bin" / "python3").symlink_to(sys.executable)
            with stderr.open("wb") as file:
                process = subprocess.Popen(
                    ["sh", "-e", "-c", commands.replace("python3 ", "exec python3 ")],
                    cwd=folder,
                    env={**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"},
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                )
            try:
                deadline_poll(lambda: "listens on" in stderr.read_text())
                self.assertIn(without_moments(shown), without_moments(stderr.read_text()))
                self.assertTrue((folder / "central.jsonl").exists())
                self.assertEqual(0o600, (folder / "input_info.json").stat().st_mode & 0o777)
            finally:
                process.terminate()
                self.assertEqual(0, process.wait(15))

    def test_the_receiver_runs_within_the_first_150_lines(self):
        top = "\n".join(TEXT.split("\n")[:150])
        for needed in ("cp input_info.json.example", "sudo cp nginx/", "--send-sample https://"):
            with self.subTest(needed):
                self.assertIn(needed, top)

    def test_the_whole_fits_into_800_lines(self):
        self.assertLessEqual(TEXT.count("\n"), 800)


class ReferenceTest(unittest.TestCase):
    """The tables of README.md against the code."""

    @classmethod
    def setUpClass(cls):
        cls.receiver = Receiver(config_of(log_file="central.jsonl")).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def test_every_key_is_in_the_table_of_the_configuration(self):
        tables = [value for value in vars(client).values() if isinstance(value, dict)]
        options = {
            name: option
            for one in tables
            for name, option in one.items()
            if hasattr(option, "expected") and hasattr(option, "default")
        }
        rows = table("key", section("Configuration"))
        shown = {key.rpartition(".")[2]: row[1] for row in rows for key in code_of(row[0])}
        top = {"webclient_info", "central_info"}
        self.assertEqual(set(options) - top, set(shown) - top)
        for name in top:
            self.assertIn(f"`{name}`", section("Configuration"))
        for name in set(shown) & set(options):
            default = options[name].default
            with self.subTest(name):
                if default is client.REQUIRED:
                    self.assertRegex(shown[name], "required$")
                elif isinstance(default, (int, str)):
                    self.assertRegex(shown[name], rf", `?{default}`?$")

    def test_every_type_of_sender_is_described(self):
        rows = {code_of(row[0])[0]: row for row in table("type", section("Other senders"))}
        self.assertEqual(set(client.TYPES), set(rows))
        for name, scheme in client.HEADER_SIGNATURES.items():
            header, _, prefix = code_of(rows[name][2])[0].partition(": ")
            self.assertEqual(
                (scheme.header, scheme.prefix), (header.lower(), prefix.replace("...", ""))
            )
        self.assertIn("`bracken` and `entrupy` look like `mist`", section("Other senders"))
        undetected = {name for name, row in rows.items() if row[4] == "not detected"}
        self.assertEqual(set(client.NO_DEDUP), undetected)

    def test_every_reason_is_in_the_table_of_statuses(self):
        expected = {(str(status), reason) for reason, status in client.STATUS_BY_REASON.items()}
        expected |= {("200", "accepted"), ("200", "duplicate")}
        found = set()
        by_nginx = set()
        for statuses, reason, *_ in table("status", section("Troubleshooting")):
            reasons = code_of(reason)
            if reasons == ["accepted", "duplicate"]:
                self.assertEqual("200", statuses)
                found |= {("200", "accepted"), ("200", "duplicate")}
            elif reasons:
                self.assertEqual(statuses.count(","), len(reasons) - 1)
                found |= set(zip(statuses.split(", "), reasons))
            if "by nginx" in reason:
                by_nginx |= set(statuses.split(", "))
        self.assertEqual(expected, found)
        text = NGINX.read_text(encoding="utf-8")
        (listed,) = re.findall(r"error_page (400 .+) /refused-by-nginx;", text)
        unlisted = {status for status in by_nginx if f"return {status} " in text}
        self.assertEqual(set(), by_nginx - set(listed.split()) - unlisted)

    def test_every_message_that_is_quoted_is_one_of_the_code(self):
        rows = table("status", section("Troubleshooting"))
        known = SOURCE + NGINX.read_text(encoding="utf-8")
        for phrase in (phrase for row in rows for phrase in code_of(row[2])):
            with self.subTest(phrase):
                self.assertIn(phrase, known)

    def test_every_metric_is_described(self):
        text = self.receiver.request(raw_request("GET", "/metrics", length=False)).body.decode()
        kinds = dict(re.findall(r"(?m)^# TYPE (\S+) (\S+)$", text))
        samples = re.findall(r"(?m)^(\w+)(.*)$", text)
        labels = {name: set(re.findall(r'(\w+)="', rest)) for name, rest in samples}
        found_kinds = {}
        found_labels = {}
        for name, kind, _ in table("metric"):
            name, _, rest = code_of(name)[0].partition("{")
            found_kinds[name] = kind
            found_labels[name] = set(re.findall(r"\w+", rest))
        self.assertEqual(kinds, found_kinds)
        self.assertEqual(labels, found_labels)

    def test_every_limit_has_the_number_of_the_code(self):
        units = {"": 1, "KiB": 1 << 10, "s": 1, "min": 60}
        for name, value, _ in table("limit"):
            with self.subTest(name):
                digits, _, unit = value.partition(" ")
                self.assertEqual(getattr(client, code_of(name)[0]), float(digits) * units[unit])

    def test_every_option_is_described(self):
        _, text, _ = run_at_once(["--help"], env={**os.environ, "COLUMNS": "200"})[0]
        options = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))
        (paragraph,) = re.findall(r"(?ms)^Options: .+?\n\n", section("Configuration"))
        shown = {
            option for code in code_of(paragraph) for option in re.findall("^-[-a-zA-Z]+", code)
        }
        self.assertEqual(options, shown)
        used = set(re.findall(r"central_webhook_client\.py [^\n`]*?(--[a-z-]+)", TEXT))
        self.assertEqual(set(), used - shown)

    def test_every_field_of_a_line_is_described(self):
        for body in (new_body(), b"not JSON", b"\xff"):
            self.assertEqual(200, self.receiver.deliver(body).status)
        log = self.receiver.folder / "central.jsonl"
        lines = [list(json.loads(line)) for line in log.read_text().splitlines()]
        stdout = [list(json.loads(line)) for line in self.receiver.wait_for_stdout(3)]
        shown = {name for row in table("field") for name in code_of(row[0])}
        self.assertEqual(set().union(*lines), shown)
        self.assertEqual({"key"}, set().union(*lines) - set().union(*stdout))
        (example,) = blocks("json", section("What it prints"))
        self.assertEqual(stdout[0], list(json.loads(example)))

    @unittest.skipUnless(shutil.which("grep"), "needs grep")
    def test_the_security_comments_are_found_as_shown(self):
        (command,) = [one for one in inline_commands() if one.startswith("grep")]
        done = subprocess.run(
            ["sh", "-c", command], cwd=TOP, capture_output=True, text=True, timeout=10
        )
        found = done.stdout.count("# Security:")
        self.assertGreater(found, 0)
        self.assertEqual(SOURCE.count("# Security:"), found)

    def test_links_within_the_file_lead_somewhere(self):
        titles = re.findall("(?m)^#{2,} (.+)$", TEXT)
        anchors = {re.sub("[^a-z -]", "", title.lower()).replace(" ", "-") for title in titles}
        links = set(re.findall(r"\]\(#(.+?)\)", TEXT))
        self.assertEqual(set(), links - anchors)
        contents = section("").partition("**Contents**")[2]
        self.assertEqual(anchors, set(re.findall(r"\]\(#(.+?)\)", contents)))

    def test_every_command_is_executed_or_says_why_not(self):
        found = [*blocks("sh"), *inline_commands()]
        known = [*EXECUTED, *NOT_EXECUTED]
        for code in found:
            with self.subTest(code):
                self.assertEqual(1, sum(code.startswith(start) for start in known))
        for start in known:
            with self.subTest(start):
                self.assertTrue(any(code.startswith(start) for code in found))
        loader = unittest.TestLoader()
        for test in EXECUTED.values():
            loader.loadTestsFromName(f"tests.{test}")
        self.assertEqual([], loader.errors)


class ConfigurationTest(unittest.TestCase):
    """The example and the worked configurations are valid but for their placeholders."""

    def test_the_example_lacks_nothing_but_the_token(self):
        text = EXAMPLE.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory(prefix="readme-") as folder:
            paths = [Path(folder, "example.json"), Path(folder, "completed.json")]
            for path, found in zip(paths, (text, re.sub("<.+>", TOKEN, text))):
                path.write_text(found, encoding="utf-8")
                path.chmod(0o600)
            example, completed = run_at_once(*([f"-i={path}", "--check-config"] for path in paths))
        error = f"{paths[0]}: central_info.webhook.token: {PLACEHOLDER}\n"
        self.assertEqual((78, error), (example[0], example[2].partition("error: ")[2]))
        self.assertEqual((0, ""), (completed[0], completed[2]))

    def errors(self, text):
        """Return the errors that the code finds in a configuration."""
        try:
            client.read_config(text.encode())
        except client.ConfigError as error:
            return list(error.args)
        return []

    def test_the_worked_configurations_lack_nothing_but_the_secrets(self):
        (shown,) = [json.loads(code) for code in blocks("json", section("Other senders"))]
        mist = next(webhook for webhook in shown if webhook["type"] == "mist")
        shown += [{**mist, "name": name, "type": name} for name in ("bracken", "entrupy")]
        self.assertEqual(set(client.TYPES) - {"central"}, {webhook["type"] for webhook in shown})
        for found in [*shown, shown]:  # each alone, and all together
            text = json.dumps(config_of(webhook=found))
            with self.subTest(text):
                errors = self.errors(text)
                self.assertEqual(text.count('"<'), len(errors), errors)
                self.assertTrue(all(PLACEHOLDER in error for error in errors), errors)
                for number in range(len(errors)):  # each its own secret
                    text = re.sub('"<[^"]+>"', f'"{TOKEN}-{number}"', text, count=1)
                self.assertEqual([], self.errors(text))


@unittest.skipUnless(os.name == "posix", "needs sh")
class SnippetTest(unittest.TestCase):
    """What README.md offers to copy, copied."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="readme-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        shutil.copy(PROGRAM, self.folder)

    def test_the_copied_section_verifies_on_its_own(self):
        command = block("sh", "{ echo", section("Copy the verification"))
        done = subprocess.run(
            ["sh", "-e", "-c", command], cwd=self.folder, capture_output=True, text=True, timeout=10
        )
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        path = self.folder / "central_signature.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        body = b'{"alert_type":"New AP detected","details":{"serial":"DZ1"}}'
        headers = {  # made with OpenSSL
            "X-Central-Service": "Alerts",
            "X-Central-Delivery-ID": "72d3162e-cc78-11e3-81ab-4c9367dc0958",
            "X-Central-Delivery-Timestamp": "2016-07-12T13:14:19-07:00",
            "X-Central-Signature": "O1BifJezSO7kZzM75C6XoHMaOGEW2nUXjjiTeBfYWv4=",
        }
        self.assertIsNone(module.verify_signature(body, headers, TOKEN))
        with self.assertRaises(module.SignatureError):
            module.verify_signature(body.replace(b"DZ1", b"DZ2"), headers, TOKEN)

    def test_one_row_adds_a_sender(self):
        (row,) = re.findall(r'`("github": .+)`', section("Other senders"))
        path = self.folder / PROGRAM.name
        source = path.read_text(encoding="utf-8")
        start = re.search(r"(?m)^HEADER_SIGNATURES\b.*= \{.*\n", source).end()
        path.write_text(f"{source[:start]}{row}\n{source[start:]}", encoding="utf-8")
        secret, body = "It's a Secret to Everybody", b"Hello, World!"  # of GitHub's documentation
        signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
        webhook = {"name": "github", "type": "github", "path": PATH, "token": secret}
        with Receiver(config_of(webhook=webhook), program=path) as receiver:
            headers = {"X-Hub-Signature-256": signature}
            self.assertEqual(200, receiver.post(body, headers).status)
            self.assertEqual(401, receiver.post(body + b"!", headers).status)


if __name__ == "__main__":
    unittest.main()
