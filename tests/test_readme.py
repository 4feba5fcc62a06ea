"""README.md, --help, the example and the code say the same; what README.md shows is what comes."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import signal
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
    central_headers,
    config_of,
    deadline_poll,
    new_body,
    raw_request,
    run_at_once,
)

README = TOP / "README.md"
EXAMPLE = TOP / "input_info.json.example"
PLACEHOLDER = "expected the real value, found a placeholder"
SOURCE = PROGRAM.read_text(encoding="utf-8")
TEXT = README.read_text(encoding="utf-8")

# Every sh block of README.md by how it begins: the test below tests/ that executes it, or why none does.
CURL = "test_readme.FirstScreenTest.test_the_curl_commands_get_the_answers_that_are_shown"
EXECUTED = {
    "python3 central_webhook_client.py --d": "test_readme.FirstScreenTest.test_the_demo_prints_what_is_shown",
    "(umask 077; sed": CURL,
    'body=\'{"alert_type":"New AP detected","details":{"serial":"DZ1"}}\'': CURL,
    'body=\'{"alert_type":"New AP detected","details":{"serial":"DZ2"}}\'': CURL,
    "{ echo": "test_readme.SnippetTest.test_the_copied_section_verifies_on_its_own",
    "grep": "test_readme.ReferenceTest.test_every_security_comment_has_its_row",
    "tail -n 0 -F": (
        "interop.test_recipes.WatchTest."
        "test_jq_shows_critical_alerts_and_goes_on_after_what_it_cannot_read"
    ),
}
NOT_EXECUTED = {
    "(umask 077; cp": "opens an editor",
    "python3 central_webhook_client.py -i=input_info.json --send-sample": (
        "needs a public name; interop/test_nginx.py goes through nginx with a name of this machine"
    ),
    "pip install": "installs; interop/test_dashboard.py runs the last line, and dashboard.py",
    "sudo install": "needs a container engine; interop/test_recipes.py compares it with compose",
    "sudo cp": "changes the machine; interop/test_nginx.py has an nginx of its own",
    "sudo systemctl": "changes the machine, and needs a running systemd",
    "python3 -m tests.benchmark": "takes minutes",
    "python3 -m unittest": "is what runs this test",
}


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


def table(first_cell, text=TEXT):
    """Return the rows below the header whose first cell is this one."""
    lines = text.split("\n")
    (start,) = [
        number for number, line in enumerate(lines) if line.strip().startswith(f"| {first_cell} |")
    ]
    rows = []
    for line in lines[start + 2 :]:
        if not line.strip().startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip()[1:-1].split("|")])
    return rows


def code_of(cell):
    """Return what stands between backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def run_program(*arguments, **options):
    """Run the program to its end."""
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        **options,
    )


def without_moments(text):
    """Return a text without what differs from run to run: times, ports, numbers of milliseconds."""
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?", "TIME", text)
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)


class FirstScreenTest(unittest.TestCase):
    """What a reader tries first."""

    def test_the_demo_prints_what_is_shown(self):
        (command, *_), (shown, *_) = blocks("sh", section("")), blocks("text", section(""))
        self.assertEqual("python3 central_webhook_client.py --demo\n", command)
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

    def test_the_curl_commands_get_the_answers_that_are_shown(self):
        for program in ("sh", "sed", "curl", "openssl", "base64"):
            if not shutil.which(program):
                self.skipTest(f"{program} is missing")
        (_, start, signed, changed), (_, accepted, refused, logged) = (
            blocks(kind, section("")) for kind in ("sh", "text")
        )
        with tempfile.TemporaryDirectory(prefix="readme-") as name:
            folder, log = Path(name), Path(name, "stderr")
            shutil.copy(PROGRAM, folder)
            example = EXAMPLE.read_text(encoding="utf-8")
            self.assertIn('"port": 8010', example)
            (folder / EXAMPLE.name).write_text(
                example.replace('"port": 8010', '"port": 0'), encoding="utf-8"
            )
            with log.open("wb") as stderr:
                process = subprocess.Popen(
                    ["sh", "-e", "-c", start.replace("python3 ", f"exec '{sys.executable}' ")],
                    cwd=folder,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                )
            try:
                found = deadline_poll(
                    lambda: re.search(r"listens on \S+ port (\d+)", log.read_text())
                )
                script = (signed + changed).replace("127.0.0.1:8010", f"127.0.0.1:{found[1]}")
                done = subprocess.run(
                    ["sh", "-e", "-c", script], capture_output=True, text=True, timeout=30
                )
                self.assertEqual(accepted + refused, done.stdout, done.stderr)
                self.assertEqual(["wrong"], re.findall("wrong", logged))
                deadline_poll(
                    lambda: without_moments(logged) in without_moments(log.read_text()), 10, logged
                )
                self.assertEqual(0o600, (folder / "input_info.json").stat().st_mode & 0o777)
            finally:
                process.send_signal(signal.SIGTERM)
                stdout = process.communicate(timeout=20)[0]
        self.assertEqual(["DZ1"], re.findall(rb"DZ\d".decode(), stdout.decode()))


class ReferenceTest(unittest.TestCase):
    """The tables of README.md against the code."""

    @classmethod
    def setUpClass(cls):
        cls.receiver = Receiver(config_of(log_file="central.jsonl")).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def test_every_key_is_in_the_table_of_the_configuration(self):
        places = {
            "TOP_KEYS": "",
            "WEBCLIENT_KEYS": "webclient_info.",
            "CENTRAL_KEYS": "central_info.",
            "WEBHOOK_KEYS": "webhook.",
            "API_KEY_KEYS": "webhook.api_key.",
            "OIDC_KEYS": "webhook.oidc.",
        }
        self.assertEqual(set(places), {name for name in vars(client) if name.endswith("_KEYS")})
        keys = {
            prefix + name: key
            for place, prefix in places.items()
            for name, key in vars(client)[place].items()
        }
        rows = table("key", section("Configuration"))
        self.assertEqual(sorted(keys), sorted(code_of(row[0])[0] for row in rows))
        for name, kind, _ in rows:
            key = keys[code_of(name)[0]]
            with self.subTest(name):
                if key.default is ...:
                    self.assertRegex(kind, "required$")
                elif isinstance(key.default, (int, str)):
                    self.assertRegex(kind, rf", `?{key.default}`?$")

    def test_every_type_of_sender_is_described(self):
        rows = table("type", section("Other senders"))
        self.assertEqual(sorted(client.TYPES), sorted(code_of(row[0])[0] for row in rows))
        for (kind,), header in ((code_of(row[0]), code_of(row[1])[0]) for row in rows):
            if kind in client.HEADER_SIGNATURES:
                scheme = client.HEADER_SIGNATURES[kind]
                name, _, prefix = header.partition(": ")
                self.assertEqual(
                    (scheme.header, scheme.prefix), (name.lower(), prefix.replace("...", ""))
                )

    def test_every_reason_is_in_the_table_of_responses(self):
        expected = {(str(status), reason) for reason, status in client.REFUSALS.items()}
        expected |= {("200", "accepted"), ("200", "duplicate")}
        rows = table("status", section("Responses"))
        self.assertEqual(sorted(expected), sorted((row[0], code_of(row[1])[0]) for row in rows))

    def test_every_metric_is_described(self):
        text = self.receiver.request(raw_request("GET", "/metrics", length=False)).body.decode()
        kinds = dict(re.findall(r"(?m)^# TYPE (\S+) (\S+)$", text))
        labels = {
            name: set(re.findall(r'(\w+)="', rest))
            for name, rest in re.findall(r"(?m)^(\w+)(.*)$", text)
        }
        shown = [
            (*re.fullmatch(r"(\w+)(?:\{(.*)\})?", code_of(row[0])[0]).groups(""), row[1])
            for row in table("metric", section("Responses"))
        ]
        self.assertEqual(kinds, {name: kind for name, _, kind in shown})
        self.assertEqual(
            labels, {name: set(filter(None, found.split(","))) for name, found, _ in shown}
        )

    def test_every_limit_is_described_with_its_number(self):
        (constants,) = re.findall(r"(?s)# ---- Constants and limits -+\n(.*?)\n# ----", SOURCE)
        names = {
            name
            for line in re.findall(r"(?m)^([A-Z_, ]+) = ", constants)
            for name in line.split(", ")
        }
        limits = {
            n
            for n in names
            if re.match("(MAX|MIN)_", n) or re.search("_(SECONDS|SECOND|DELIVERIES)$", n)
        }
        rows = table("limit", section("Responses"))
        self.assertEqual(sorted(limits), sorted(code_of(row[0])[0] for row in rows))
        units = {"": 1, "B": 1, "KiB": 1 << 10, "s": 1, "min": 60, "h": 3600}
        for name, number, _ in rows:
            with self.subTest(name):
                digits, _, unit = number.partition(" ")
                self.assertEqual(getattr(client, code_of(name)[0]), float(digits) * units[unit])

    def test_every_option_is_described(self):
        done = run_program("--help", env={**os.environ, "COLUMNS": "200"})
        options = set(
            re.findall(
                r"(?<![\w-])--?[a-zA-Z][\w-]*", done.stdout.partition("options:")[2] or done.stdout
            )
        )
        shown = [
            option
            for row in table("option")
            for code in code_of(row[0])
            for option in re.findall("^-[-a-zA-Z]+", code)
        ]
        self.assertEqual(sorted(options), sorted(shown))
        used = set(re.findall(r"central_webhook_client\.py [^\n]*?(--[a-z-]+)", TEXT))
        self.assertEqual(set(), used - options)

    def test_every_field_of_a_line_is_described(self):
        for body in (new_body(), b"no JSON", b"\xff"):
            self.assertEqual(200, self.receiver.deliver(body).status)
        log = self.receiver.folder / "central.jsonl"
        lines = [list(json.loads(line)) for line in log.read_text().splitlines()]
        stdout = [list(json.loads(line)) for line in self.receiver.wait_for_stdout(3)]
        self.assertEqual(set().union(*lines), {code_of(row[0])[0] for row in table("field")})
        self.assertEqual({"key"}, set().union(*lines) - set().union(*stdout))
        (shown,) = [json.loads(code) for code in blocks("json", section("What it prints"))]
        self.assertEqual(stdout[0], list(shown))

    def test_a_pretty_alert_looks_as_shown(self):
        (shown,) = (code for code in blocks("text", section("What it prints")))
        header, alert = shown.split("\n", 1)
        webhook = {"name": "central", "path": PATH, "token": TOKEN}
        with Receiver(config_of(webhook=webhook), ["--format=pretty"]) as receiver:
            self.assertEqual(200, receiver.deliver(json.dumps(json.loads(alert)).encode()).status)
            lines = receiver.wait_for_stdout(shown.count("\n"))
        self.assertEqual(
            without_moments(shown).splitlines(), [without_moments(line) for line in lines]
        )

    def test_every_hint_is_one_that_the_code_gives(self):
        for phrase, _ in table("the log says"):
            with self.subTest(phrase):
                self.assertIn(re.split(r"\.\.\.|'| \(|x-", phrase)[0], SOURCE)

    def test_every_security_comment_has_its_row(self):
        command = block("sh", "grep -n -A3", section("Security decisions and what is not covered"))
        begins = [row[0] for row in table("the comment begins")]
        comments = re.findall(r"# Security: (.*)", SOURCE)
        for comment in comments:
            with self.subTest(comment):
                self.assertEqual(1, sum(comment.startswith(begin) for begin in begins))
        self.assertEqual(len(comments), len(begins))
        if shutil.which("grep"):
            done = subprocess.run(
                ["sh", "-c", command], cwd=TOP, capture_output=True, text=True, timeout=10
            )
            self.assertEqual(len(comments), done.stdout.count("# Security:"))

    def test_the_map_in_the_docstring_is_that_of_the_banners(self):
        banners = re.findall(r"(?m)^# ---- (.+?) -+$", SOURCE)
        listed = re.search(r"prints this map\):\n\n((?:    .+\n)+)", client.__doc__)
        self.assertEqual(banners, textwrap.dedent(listed[1]).splitlines())
        (named,) = re.findall(r'The section "(.+?)" stands', section("Copy only the verification"))
        self.assertIn(named, banners)

    def test_links_within_the_file_lead_somewhere(self):
        titles = {
            re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-")
            for title in re.findall("(?m)^## (.+)$", TEXT)
        }
        self.assertEqual(set(), set(re.findall(r"\]\(#(.+?)\)", TEXT)) - titles)

    def test_every_sh_block_is_executed_or_says_why_not(self):
        found = blocks("sh")
        self.assertEqual(TEXT.count("```sh\n"), len(found))
        known = [*EXECUTED, *NOT_EXECUTED]
        for code in found:
            with self.subTest(code):
                self.assertEqual(1, sum(code.startswith(start) for start in known))
        for start in known:
            with self.subTest(start):
                self.assertEqual(1, sum(code.startswith(start) for code in found))
        for test in EXECUTED.values():
            *module, name, method = test.split(".")
            source = TOP.joinpath("tests", *module).with_suffix(".py").read_text(encoding="utf-8")
            with self.subTest(test):
                self.assertRegex(source, rf"(?s)class {name}\(.*?    def {method}\(")


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
        mistake = f"{paths[0]}: central_info.webhook.token: {PLACEHOLDER}\n"
        self.assertEqual((78, mistake), (example[0], example[2].partition("error: ")[2]))
        self.assertEqual((0, ""), (completed[0], completed[2]))

    def mistakes(self, text):
        """Return the mistakes that the code finds in a configuration."""
        try:
            client.read_config(text.encode())
        except client.ConfigError as error:
            return list(error.args)
        return []

    def test_the_worked_configurations_lack_nothing_but_the_secrets(self):
        webhooks = [json.loads(code) for code in blocks("json", section("Other senders"))]
        self.assertEqual(set(client.TYPES) - {"central"}, {webhook["type"] for webhook in webhooks})
        self.assertEqual(
            {"header", "field", "value"},
            {key for webhook in webhooks for key in webhook.get("api_key", {})},
        )
        self.assertTrue(any("oidc" in webhook for webhook in webhooks))
        for found in [*webhooks, webhooks]:  # each alone, and all together
            text = json.dumps(config_of(webhook=found))
            with self.subTest(text):
                mistakes = self.mistakes(text)
                self.assertEqual(
                    text.count('"<'), sum(PLACEHOLDER in mistake for mistake in mistakes)
                )
                self.assertEqual(text.count('"<'), len(mistakes), mistakes)
                self.assertEqual([], self.mistakes(re.sub('"<[^"]+>"', f'"{TOKEN}"', text)))


class SnippetTest(unittest.TestCase):
    """What README.md offers to copy, copied."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="readme-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        shutil.copy(PROGRAM, self.folder)

    def start(self, program, webhook):
        """Start a changed program with a configuration; return the running receiver."""
        return Receiver(config_of(webhook=webhook), program=self.folder / program)

    def test_the_copied_section_verifies_on_its_own(self):
        code = section("Copy only the verification")
        done = subprocess.run(
            ["sh", "-e", "-c", block("sh", "{ echo", code)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        spec = importlib.util.spec_from_file_location(
            "central_signature", self.folder / "central_signature.py"
        )
        sys.modules["central_signature"] = importlib.util.module_from_spec(spec)
        self.addCleanup(sys.modules.pop, "central_signature")
        spec.loader.exec_module(sys.modules["central_signature"])
        (example,) = blocks("python", code)
        namespace = {}
        exec(compile(example, "README.md", "exec"), namespace)
        body = b'{"alert_type":"New AP detected","details":{"serial":"DZ1"}}'
        environ = {
            "HTTP_X_CENTRAL_SERVICE": "Alerts",
            "HTTP_X_CENTRAL_DELIVERY_ID": "72d3162e-cc78-11e3-81ab-4c9367dc0958",
            "HTTP_X_CENTRAL_DELIVERY_TIMESTAMP": "2016-07-12T13:14:19-07:00",
            "HTTP_X_CENTRAL_SIGNATURE": "O1BifJezSO7kZzM75C6XoHMaOGEW2nUXjjiTeBfYWv4=",  # made with OpenSSL
        }
        for sent, expected in (
            (body, "200 OK"),
            (body.replace(b"DZ1", b"DZ2"), "401 Unauthorized"),
        ):
            statuses = []
            answer = namespace["application"](
                {**environ, "CONTENT_LENGTH": str(len(sent)), "wsgi.input": io.BytesIO(sent)},
                lambda status, headers, statuses=statuses: statuses.append(status),
            )
            self.assertEqual(([expected], [b""]), (statuses, answer))

    def test_one_line_adds_a_sender(self):
        (line,) = blocks("python", section("Other senders"))
        path = self.folder / PROGRAM.name
        source = path.read_text(encoding="utf-8")
        start = re.search(r"(?m)^HEADER_SIGNATURES\b.*= \{.*\n", source).end()
        path.write_text(
            source[:start] + textwrap.indent(line, "    ") + source[start:], encoding="utf-8"
        )
        secret, body = "It's a Secret to Everybody", b"Hello, World!"  # of GitHub's documentation
        signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
        with self.start(
            PROGRAM.name, {"name": "github", "type": "github", "path": PATH, "token": secret}
        ) as receiver:
            self.assertEqual(200, receiver.post(body, {"X-Hub-Signature-256": signature}).status)
            self.assertEqual(
                401, receiver.post(body + b"!", {"X-Hub-Signature-256": signature}).status
            )

    def test_handle_alert_can_be_replaced_from_another_file(self):
        code = block("python", "import sys", section("Send alerts on"))
        (self.folder / "my_receiver.py").write_text(code)
        with self.start(
            "my_receiver.py", {"name": "noc", "path": PATH, "token": TOKEN}
        ) as receiver:
            self.assertEqual(200, receiver.deliver(new_body()).status)
            receiver.wait_for_log(r"^noc [0-9a-f]{32}\.[0-9a-f]{32} AP disconnected$")
            for body in (b"[]", b"not JSON", b'{"name": "new Central"}'):
                answer = receiver.post(body, central_headers(body))
                self.assertEqual((200, {"status": "ok"}), (answer.status, answer.json))
            self.assertEqual(0, receiver.stop())
            self.assertEqual(3, sum(line.endswith(" None") for line in receiver.stderr_lines))
            self.assertEqual(4, len(receiver.stdout_lines))


if __name__ == "__main__":
    unittest.main()
