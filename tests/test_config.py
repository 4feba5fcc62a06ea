"""The configuration: every mistake has one line that names its key, all at once, and never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import tempfile
import unittest
from pathlib import Path

import central_webhook_client as product
from tests.support import (
    PATH,
    TOKEN,
    TOP,
    Receiver,
    captured_stderr,
    central_headers,
    config_of,
    new_body,
    run_at_once,
)

SECRET = "this-must-never-be-shown"
NOTHING = object()  # as a value: leave the key out
HOOK = "central_info.webhook"


def changed(found, changes):
    """Return a copy with these keys set, or left out."""
    return {name: value for name, value in {**found, **changes}.items() if value is not NOTHING}


def web(**changes):
    config = config_of()
    return {**config, "webclient_info": changed(config["webclient_info"], changes)}


def hook(**changes):
    return config_of(webhook=changed({"name": "noc", "path": PATH, "token": SECRET}, changes))


def new_central(**changes):
    return hook(
        type="new-central",
        **{"public_url": "https://central.example.com/centralwebhook", **changes},
    )


def api_key(**changes):
    return hook(api_key=changed({"header": "X-Key", "value": SECRET}, changes))


def oidc(**changes):
    found = {
        "well_known_url": "https://login.example.com/w",
        "audience": "receiver",
        "client_id": "central",
    }
    return hook(oidc=changed(found, changes))


class Called(unittest.TestCase):
    """Calls the program within this process, or as one of its own, with a file of its own."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="config-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = self.folder / "input_info.json"

    def write(self, config, mode=0o600, path=None):
        path = path or self.path
        if isinstance(config, bytes):
            path.write_bytes(config)
        else:
            path.write_text(config if isinstance(config, str) else json.dumps(config))
        path.chmod(mode)

    def assert_clean(self, stdout, stderr):
        for text in (stdout, stderr):
            self.assertNotIn("Traceback", text)
            self.assertNotIn(SECRET, text)
            self.assertNotIn(TOKEN, text)
            self.assertNotRegex(text, "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]")

    def call(self, *arguments):
        """Return exit code, stdout and stderr of main()."""
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout), captured_stderr() as stderr:
            try:
                code = product.main(list(arguments))
            except SystemExit as end:
                code = end.code or 0
            said = stderr()
        self.assert_clean(stdout.getvalue(), said)
        return code, stdout.getvalue(), said

    def run_at_once(self, *runs):
        """Return exit code, stdout and stderr of processes that end by themselves, for each list of arguments."""
        results = run_at_once(*runs)
        for _, stdout, stderr in results:
            self.assert_clean(stdout, stderr)
        return results

    def run_with_each(self, *configs):
        """Return path, exit code, stdout and stderr of a process for each of these configurations."""
        paths = [self.folder / f"{number}.json" for number in range(len(configs))]
        for path, config in zip(paths, configs):
            self.write(config, path=path)
        results = self.run_at_once(*([f"-i={path}"] for path in paths))
        return [(path, *result) for path, result in zip(paths, results)]

    def check(self, config, mode=0o600):
        """Return exit code, stdout and stderr of --check-config."""
        if config is not None:
            self.write(config, mode)
        return self.call(f"-i={self.path}", "--check-config")

    def mistakes(self, config):
        """Return what is said of a wrong configuration, line by line, without what all begin with."""
        code, stdout, stderr = self.check(config)
        self.assertEqual((code, stdout), (78, ""), stderr)
        prefix = f"central_webhook_client.py: error: {self.path}: "
        lines = stderr.splitlines()
        self.assertTrue(lines)
        for line in lines:
            self.assertTrue(line.startswith(prefix), line)
        return [line[len(prefix) :] for line in lines]

    def assert_names(self, lines, key):
        """One of the lines must be about this key, and say something about it."""
        pattern = re.escape(key) + r"(\[\d+\])?: .{5}"
        self.assertTrue([line for line in lines if re.match(pattern, line)], (key, lines))

    def assert_mistakes(self, table):
        """Each configuration of the table must have one mistake, at the key."""
        for number, (key, config) in enumerate(table):
            with self.subTest(key, number=number):
                lines = self.mistakes(config)
                self.assertEqual(len(lines), 1, lines)
                self.assert_names(lines, key)


# ---- Mistakes ---------------------------------------------------------------------------


class Mistakes(Called):
    def test_the_configurations_that_are_changed_here_are_right(self):
        for config in (web(), hook(), new_central(), api_key(), oidc()):
            code, _, stderr = self.check(config)
            self.assertEqual((code, stderr), (0, ""))

    def test_of_the_receiver(self):
        key = "webclient_info."
        table = [
            (key + "host", web(host=value))
            for value in (NOTHING, "", 5, True, ["127.0.0.1"], {}, None)
        ]
        ports = (
            NOTHING,
            True,
            False,
            -1,
            65536,
            80.5,
            "http",
            "-1",
            "65536",
            "+80",
            " 80",
            "80 ",
            "8_0",
            "0x50",
            "",
        )
        ports += ("\uff18\uff10", "\u0668", "80\n", [80], {}, None, 10**30)
        table += [(key + "port", web(port=value)) for value in ports]
        table += [(key + "log_file", web(log_file=value)) for value in (5, True, "", ["x"], {})]
        for name in ("max_body_bytes", "max_connections"):
            table += [
                (key + name, web(**{name: value}))
                for value in (-1, "100", True, 1.5, [], {}, 10**30)
            ]
        for value in (-1, "10", True, [], {}, 10**30):
            table.append((key + "request_timeout_seconds", web(request_timeout_seconds=value)))
        self.assert_mistakes(table)

    def test_of_a_webhook(self):
        table = [(f"{HOOK}.name", hook(name=value)) for value in (5, "", True, [], {})]
        table += [
            (f"{HOOK}.type", hook(type=value))
            for value in ("classic", "Central", "", 5, True, [], {})
        ]
        paths = (
            "centralwebhook",
            "",
            5,
            True,
            [],
            {},
            "/health",
            "/metrics",
            "/a?b",
            "/a b",
            "/a\n",
            "https://a/b",
        )
        table += [(f"{HOOK}.path", hook(path=value)) for value in paths]
        table += [
            (f"{HOOK}.replay_window_hours", hook(replay_window_hours=value))
            for value in (-1, "48", True, [], {}, 10**400)
        ]
        self.assert_mistakes(table)

    def test_of_a_token(self):
        wrong = (
            "",
            5,
            True,
            None,
            {},
            [],
            [""],
            [5],
            [None],
            [[SECRET]],
            [SECRET, ""],
            {"token": SECRET},
        )
        spaces = (
            f" {SECRET}",
            f"{SECRET} ",
            f"{SECRET}\n",
            f"\t{SECRET}",
            f"{SECRET}\u00a0",
            [SECRET, f" {SECRET}"],
        )
        others = (
            "<placeholder>",
            "<token of the webhook, from Central>",
            ["<placeholder>"],
            "\ud800",
        )
        table = [
            (f"{HOOK}.token", hook(token=value)) for value in (NOTHING, *wrong, *spaces, *others)
        ]
        table.append((f"{HOOK}.token", hook(token_file="token")))
        self.assert_mistakes(table)

    def test_the_wrong_one_of_several_tokens_is_named(self):
        lines = self.mistakes(hook(token=[SECRET, "", SECRET + "2", 5]))
        self.assertEqual(len(lines), 2)
        self.assert_names(lines, f"{HOOK}.token[1]")
        self.assert_names(lines, f"{HOOK}.token[3]")

    def test_of_public_url(self):
        key = f"{HOOK}.public_url"
        urls = (
            NOTHING,
            "",
            5,
            True,
            [],
            "central.example.com/a",
            "/a",
            "ftp://central.example.com/a",
            "https://",
        )
        urls += (
            "https:///a",
            "https://central.example.com:99999/a",
            "https://central.example.com:x/a",
        )
        urls += (
            "https://user@central.example.com/a",
            "https://central.example.com/a#b",
            "https://[::1/a",
        )
        urls += ("https://central.example.com/a b", " https://central.example.com/a", "<URL>")
        table = [(key, new_central(public_url=value)) for value in urls]
        url = "https://central.example.com/a"
        table += [
            (key, hook(type=kind, public_url=url))
            for kind in ("central", "ip-fabric", "bracken", "entrupy")
        ]
        table.append((key, hook(public_url=url)))
        self.assert_mistakes(table)

    def test_of_api_key(self):
        key = f"{HOOK}.api_key"
        table = [
            (f"{key}.value", api_key(value=value))
            for value in (NOTHING, "", 5, None, [], [""], "<key>", f" {SECRET}")
        ]
        table += [
            (f"{key}.header", api_key(header=value))
            for value in ("X Key", "X-Key:", "X-K\xe9y", "X\n")
        ]
        table += [(key, api_key(header=NOTHING)), (key, api_key(field="apiKey"))]
        self.assert_mistakes(table)
        for value in (
            SECRET,
            5,
            True,
            [],
            [{"header": "X-Key", "value": SECRET}],
            {},
            {"value": SECRET},
        ):
            with self.subTest(value):
                lines = self.mistakes(hook(api_key=value))
                self.assertTrue(all(line.startswith(key) for line in lines), lines)

    def test_of_oidc(self):
        key = f"{HOOK}.oidc"
        urls = (
            NOTHING,
            "",
            5,
            [],
            "login.example.com/w",
            "http://login.example.com/w",
            "ftp://localhost/w",
            "https://",
        )
        urls += (
            "http://127.0.0.1.example.com/w",
            "http://localhost.example.com/w",
            "http://128.0.0.1/w",
            "https://[::1",
        )
        table = [(f"{key}.well_known_url", oidc(well_known_url=value)) for value in urls]
        for name in ("audience", "client_id", "issuer"):
            table += [(f"{key}.{name}", oidc(**{name: value})) for value in (5, True, "", [], {})]
        table.append((key, oidc(audience=NOTHING, client_id=NOTHING)))
        self.assert_mistakes(table)
        for value in ("x", 5, [], {}, True):
            with self.subTest(value):
                self.assertTrue(
                    all(line.startswith(key) for line in self.mistakes(hook(oidc=value)))
                )

    def test_a_provider_on_this_machine_may_do_without_tls(self):
        for host in ("127.0.0.1", "127.1.2.3", "[::1]", "localhost", "localhost:8080"):
            with self.subTest(host):
                self.assertEqual(self.check(oidc(well_known_url=f"http://{host}/w"))[0], 0)

    def test_two_demands_on_one_header(self):
        found = {"well_known_url": "https://login.example.com/w", "audience": "receiver"}

        def key(header):
            return {"header": header, "value": SECRET}

        for header, config in (
            ("authorization", hook(type="bracken", oidc=found)),
            ("authorization", hook(type="bracken", api_key=key("Authorization"))),
            ("authorization", hook(type="central", oidc=found, api_key=key("AUTHORIZATION"))),
            ("x-central-signature", hook(api_key=key("X-Central-Signature"))),
            ("x-central-delivery-id", hook(api_key=key("x-central-delivery-id"))),
            ("x-ipf-signature", hook(type="ip-fabric", api_key=key("X-IPF-Signature"))),
            ("entrupy-signature", hook(type="entrupy", api_key=key("Entrupy-Signature"))),
            ("signature", new_central(api_key=key("Signature"))),
            ("signature-input", new_central(api_key=key("Signature-Input"))),
        ):
            with self.subTest(header):
                lines = self.mistakes(config)
                self.assertEqual(len(lines), 1, lines)
                self.assertIn(HOOK, lines[0])
                self.assertIn(header, lines[0].lower())
        for config in (
            hook(type="bracken", api_key=key("X-Key")),
            hook(type="ip-fabric", oidc=found),
            hook(oidc=found, api_key=key("X-Key")),
            hook(type="bracken", api_key={"field": "Authorization", "value": SECRET}),
        ):
            self.assertEqual(self.check(config)[0], 0)

    def test_of_several_webhooks(self):
        def several(*changes):
            return config_of(
                webhook=[changed({"name": "a", "token": SECRET}, change) for change in changes]
            )

        self.assertEqual(self.check(several({}, {"name": "b"}))[0], 0)
        self.assertEqual(self.check(several({"name": NOTHING}))[0], 0)
        self.assert_mistakes(
            [
                (f"{HOOK}[1].name", several({}, {"name": NOTHING})),
                (f"{HOOK}[0].name", several({"name": NOTHING}, {})),
                (f"{HOOK}[1].token", several({}, {"name": "b", "token": ""})),
                (f"{HOOK}[0].token", several({"token": NOTHING})),
                (f"{HOOK}[2].path", several({}, {"name": "b"}, {"name": "c", "path": "x"})),
            ]
        )
        lines = self.mistakes(several({}, {"name": "b"}, {}))
        self.assertEqual(len(lines), 1)
        self.assertIn(HOOK, lines[0])
        self.assertIn('"a"', lines[0])

    def test_of_the_types_of_whole_sections(self):
        for key, config in (
            ("webclient_info", {"central_info": config_of()["central_info"]}),
            ("webclient_info", {**config_of(), "webclient_info": []}),
            ("webclient_info", {**config_of(), "webclient_info": "x"}),
            ("webclient_info", {**config_of(), "webclient_info": None}),
            ("central_info", {"webclient_info": config_of()["webclient_info"]}),
            ("central_info", {**config_of(), "central_info": []}),
            ("central_info", {**config_of(), "central_info": 5}),
            (HOOK, {**config_of(), "central_info": {}}),
            (HOOK, config_of(webhook=[])),
            (HOOK, config_of(webhook="x")),
            (HOOK, config_of(webhook=5)),
            (f"{HOOK}[0]", config_of(webhook=[5])),
            (f"{HOOK}[1]", config_of(webhook=[{"name": "a", "token": SECRET}, []])),
        ):
            with self.subTest(key, config=config):
                lines = self.mistakes(config)
                self.assertTrue(all(line.startswith(key) for line in lines), lines)
        for config in ([], "x", 5, None, True, [config_of()]):
            with self.subTest(config):
                self.mistakes(config)

    def test_an_unknown_key_names_the_nearest_known_one(self):
        for key, nearest, config in (
            ("webclient_inf", "webclient_info", {**config_of(), "webclient_inf": {}}),
            ("webclient_info.prot", "port", web(prot=1)),
            ("webclient_info.Port", "port", web(Port=1)),
            ("webclient_info.logfile", "log_file", web(logfile="x")),
            ("webclient_info.max_body", "max_body_bytes", web(max_body=1)),
            (
                "central_info.webhooks",
                "webhook",
                {**config_of(), "central_info": {**config_of()["central_info"], "webhooks": []}},
            ),
            (f"{HOOK}.tokens", "token", hook(tokens=[SECRET])),
            (f"{HOOK}.token-file", "token_file", hook(**{"token-file": "x"})),
            (f"{HOOK}.pubic_url", "public_url", hook(pubic_url="x")),
            (f"{HOOK}.replay_window", "replay_window_hours", hook(replay_window=1)),
            (f"{HOOK}.api_key.values", "value", api_key(values=[SECRET])),
            (f"{HOOK}.oidc.clientid", "client_id", oidc(clientid="x")),
        ):
            with self.subTest(key):
                lines = self.mistakes(config)
                self.assertEqual(len(lines), 1, lines)
                self.assert_names(lines, key)
                self.assertRegex(lines[0], rf"['\"`]{nearest}['\"`]")

    def test_a_key_that_is_like_no_other_is_an_error_all_the_same(self):
        for name in ("", "zzz", "\u9375", "a b", "\n", "\x1b[2J", "\u202e", "x" * 5000):
            with self.subTest(name[:9]):
                self.assertEqual(len(self.mistakes(web(**{name: 1}))), 1)

    def test_keys_that_occur_twice_are_found_in_linear_time(self):
        # A hint looks at forged bodies with the same function; comparing each key with each takes minutes.
        members = ",".join(f'"{number}":1' for number in range(100_000))
        value, twice = product.parse_json(f"{{{members},{members}}}")
        self.assertEqual((100_000, sorted(value)), (len(twice), twice))

    def test_a_key_that_occurs_twice_is_an_error(self):
        text = json.dumps(hook())
        for name, twice in (
            ("port", text.replace('"port"', '"port": 1, "port"')),
            ("host", text.replace('"host"', '"host": "127.0.0.1", "host"')),
            ("token", text.replace('"token"', '"token": "x", "token"')),
            ("webhook", text.replace('"webhook"', '"webhook": {}, "webhook"')),
            ("central_info", text.replace('"central_info"', '"central_info": {}, "central_info"')),
            ("token", text.replace('"token"', '"\\u0074oken": "x", "token"')),
        ):
            with self.subTest(name):
                lines = self.mistakes(twice)
                self.assertEqual(len(lines), 1, lines)
                self.assertIn(name, lines[0])

    def test_what_is_no_json_is_an_error_with_its_place(self):
        good = json.dumps(hook(), indent=2)
        for text, line in (
            (good.replace(",", "", 1), 4),
            (good + "}", len(good.splitlines())),
            (good[:-1], None),
            (good.replace('"host"', "host"), 3),
            (good.replace('"', "'"), 2),
            ("// comment\n" + good, 1),
            ("{", 1),
            ("", 1),
            ("\n\n", None),
        ):
            with self.subTest(text[:20]):
                found = self.mistakes(text)
                self.assertEqual(len(found), 1)
                if line:
                    self.assertRegex(found[0], rf"\b{line}\b")

    def test_what_is_not_quite_json_is_an_error(self):
        good = json.dumps(web(request_timeout_seconds=1234))
        for text in (
            good.replace("1234", "NaN"),
            good.replace("1234", "Infinity"),
            good.replace("1234", "1e999"),
            good.replace("1234", "9" * 5000),
            good.replace("1234", "-" + "9" * 5000),
            good.replace('"port": 0', '"port": ' + "9" * 5000),
            good.replace("1234", "01234"),
            good.replace("1234", "1234,"),
            "[" * 200000,
            '{"a":' * 200000,
            good.encode().replace(b"noc", b"n\xff"),
            good.encode("utf-16"),
            b"\0",
        ):
            with self.subTest(text[:20]):
                self.assertEqual(len(self.mistakes(text)), 1)

    def test_a_byte_order_mark_is_no_mistake(self):
        self.assertEqual(self.check(b"\xef\xbb\xbf" + json.dumps(hook()).encode())[0], 0)

    def test_a_file_that_cannot_be_read_is_a_mistake(self):
        for path in (self.folder / "missing.json", self.folder, self.folder / "missing" / "x.json"):
            for mode in ([], ["--check-config"]):
                with self.subTest(path.name, mode=mode):
                    code, stdout, stderr = self.call(f"-i={path}", *mode)
                    self.assertEqual((code, stdout), (78, ""))
                    self.assertRegex(
                        stderr,
                        rf"\Acentral_webhook_client\.py: error: {re.escape(str(path))}: .+\n\Z",
                    )

    def test_all_mistakes_are_reported_at_once(self):
        config = {
            "webclient_info": {"host": 5, "port": True, "max_body_bytes": "1", "nonsense": 1},
            "central_info": {
                "webhook": [
                    {"name": "a", "type": "classic", "token": f" {SECRET}"},
                    {"path": "x", "token": SECRET, "replay_window_hours": -1},
                    {"name": "a", "type": "new-central", "token": "<placeholder>"},
                ]
            },
        }
        self.write(config)
        file = f"-i={self.path}"
        for code, stdout, stderr in self.run_at_once([file], [file, "--check-config"]):
            self.assertEqual((code, stdout), (78, ""))
            prefix = f"central_webhook_client.py: error: {self.path}: "
            lines = [line[len(prefix) :] for line in stderr.splitlines() if line.startswith(prefix)]
            self.assertEqual(len(lines), len(stderr.splitlines()))
            for key in (
                "webclient_info.host",
                "webclient_info.port",
                "webclient_info.max_body_bytes",
                "webclient_info.nonsense",
                f"{HOOK}[0].type",
                f"{HOOK}[0].token",
                f"{HOOK}[1].name",
                f"{HOOK}[1].path",
                f"{HOOK}[1].replay_window_hours",
                f"{HOOK}[2].token",
                f"{HOOK}[2].public_url",
            ):
                with self.subTest(key):
                    self.assert_names(lines, key)
            self.assertTrue([line for line in lines if '"a"' in line])

    def test_a_line_says_what_was_expected_and_what_was_found(self):
        for config, expected, found in (
            (web(port="http"), "65535", '"http"'),
            (web(port=True), "65535", "true"),
            (web(max_connections="5"), "number", '"5"'),
            (hook(type="classic"), "new-central", '"classic"'),
            (hook(path="x"), "/", '"x"'),
            (hook(path="/health"), "/health", '"/health"'),
        ):
            line = self.mistakes(config)[0]
            with self.subTest(line):
                self.assertIn(expected, line)
                self.assertIn(found, line)

    def test_the_mistake_of_a_process_is_one_line_and_exit_code_78(self):
        keys = ("webclient_info.port", f"{HOOK}.token")
        results = self.run_with_each(web(port=True), hook(token=f"{SECRET} "))
        for key, (path, code, stdout, stderr) in zip(keys, results):
            with self.subTest(key):
                self.assertEqual((code, stdout), (78, ""))
                beginning = re.escape(f"central_webhook_client.py: error: {path}: {key}: ")
                self.assertRegex(stderr, rf"\A{beginning}.+\n\Z")


# ---- Tokens in files ----------------------------------------------------------------------


class TokenFiles(Called):
    def token_file(self, content, name="token", mode=0o600):
        path = self.folder / name
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def set_variable(self, name, value):
        before = os.environ.pop(name, None)
        self.addCleanup(lambda: os.environ.pop(name, None))
        if before is not None:
            self.addCleanup(os.environ.__setitem__, name, before)
        if value is not None:
            os.environ[name] = value

    def test_a_path_is_relative_to_the_configuration_file(self):
        self.token_file(SECRET.encode())
        for path in ("token", "./token", str(self.folder / "token")):
            with self.subTest(path):
                self.assertEqual(self.check(hook(token=NOTHING, token_file=path))[0], 0)

    def test_variables_are_expanded(self):
        self.token_file(SECRET.encode())
        config = hook(token=NOTHING, token_file="${TESTS_FOLDER}/token")
        self.set_variable("TESTS_FOLDER", str(self.folder))
        self.assertEqual(self.check(config)[0], 0)
        self.set_variable("TESTS_FOLDER", str(self.folder / "missing"))
        self.assertEqual(self.check(config)[0], 78)
        self.set_variable("TESTS_FOLDER", None)
        lines = self.mistakes(config)
        self.assertEqual(len(lines), 1)
        self.assert_names(lines, f"{HOOK}.token_file")
        self.assertIn("TESTS_FOLDER", lines[0])

    def test_a_dollar_without_braces_is_part_of_the_name(self):
        self.token_file(SECRET.encode(), "token$HOME")
        self.assertEqual(self.check(hook(token=NOTHING, token_file="token$HOME"))[0], 0)

    def test_one_token_a_line_with_or_without_a_line_feed_at_the_end(self):
        for content in (
            b"token-1",
            b"token-1\n",
            b"token-1\ntoken-2",
            b"token-1\ntoken-2\n",
            "t\xf6ken\n".encode(),
        ):
            with self.subTest(content):
                self.token_file(content)
                self.assertEqual(self.check(hook(token=NOTHING, token_file="token"))[0], 0)

    def test_mistakes(self):
        self.token_file(SECRET.encode())
        self.token_file(b"", "empty")
        self.token_file(b"\n\n", "blank")
        self.token_file(SECRET.encode() + b"\xff\n", "latin")
        self.token_file(f"{SECRET} \n".encode(), "space behind")
        self.token_file(f" {SECRET}\n".encode(), "space before")
        self.token_file(f"{SECRET}\n\t{SECRET}2\n".encode(), "tab in the second")
        self.token_file(b"<token>\n", "placeholder")
        names = (
            "missing",
            "empty",
            "blank",
            "latin",
            "space behind",
            "space before",
            "tab in the second",
        )
        names += ("placeholder", ".", "token/x", "a\0b")
        for name in names:
            with self.subTest(name):
                lines = self.mistakes(hook(token=NOTHING, token_file=name))
                self.assertEqual(len(lines), 1, lines)
                self.assertTrue(lines[0].startswith(f"{HOOK}.token_file"), lines)
        for value in (5, True, "", [], ["token"], {}):
            with self.subTest(value):
                lines = self.mistakes(hook(token=NOTHING, token_file=value))
                self.assertTrue(all(line.startswith(f"{HOOK}.token") for line in lines), lines)
        lines = self.mistakes(hook(token_file="token"))
        self.assertEqual(len(lines), 1, lines)


@unittest.skipUnless(os.name == "posix", "permissions are those of POSIX")
class Permissions(Called):
    def warnings(self, config, mode):
        code, stdout, stderr = self.check(config, mode)
        self.assertEqual(code, 0, stderr)
        self.assertTrue(stdout)
        return stderr.splitlines()

    def test_a_file_with_a_token_that_others_can_read_is_a_warning(self):
        for mode, warned in ((0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1), (0o644, 1)):
            for config in (hook(), api_key()):
                with self.subTest(oct(mode)):
                    lines = self.warnings(config, mode)
                    self.assertEqual(len(lines), warned, lines)
                    for line in lines:
                        self.assertIn(" WARNING ", line)
                        self.assertIn(str(self.path), line)

    def test_it_is_the_file_that_holds_the_token_that_counts(self):
        path = self.folder / "token"
        path.write_text(SECRET)
        for mode, warned in ((0o600, 0), (0o644, 1)):
            path.chmod(mode)
            lines = self.warnings(hook(token=NOTHING, token_file="token"), 0o644)
            with self.subTest(oct(mode)):
                self.assertEqual(len(lines), warned, lines)
                self.assertTrue(all(str(path) in line for line in lines))


# ---- Starts that fail, and those that do not -------------------------------------------------


class Starts(Called):
    def assert_cannot_serve(self, cases):
        """Start a receiver for each name in `cases` with its configuration; each must end and say the name."""
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

    def test_a_log_file_that_cannot_be_opened(self):
        (self.folder / "directory").mkdir()
        self.assert_cannot_serve(
            {
                "alerts.log": web(log_file="missing/alerts.log"),
                "directory": web(log_file="directory"),
            }
        )
        self.assertFalse((self.folder / "missing").exists())

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
    """One receiver whose configuration is right and unusual: what can be seen of it from outside."""

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


PLACEHOLDERS = (
    "<token of the webhook>",
    "${CENTRAL_TOKEN}",
    "$CENTRAL_TOKEN",
    "{{ token }}",
    "%TOKEN%",
    "changeme",
    "CHANGE_ME",
    "YOUR_TOKEN_HERE",
    "your_token_here",
)


class Placeholders(Called):
    def test_a_placeholder_is_not_a_secret(self):
        for placeholder in PLACEHOLDERS:
            for config, key in (
                (hook(token=placeholder), "token"),
                (api_key(value=placeholder), "api_key.value"),
            ):
                with self.subTest(placeholder, key=key):
                    self.write(config)
                    code, _, stderr = self.call("-i", str(self.path), "--check-config")
                    self.assertEqual((code, stderr.count("\n")), (78, 1), stderr)
                    self.assertIn(
                        f"{HOOK}.{key}: expected the real value, found a placeholder", stderr
                    )

    def test_a_real_secret_is_not_taken_for_a_placeholder(self):
        for token in (
            "zSMrzuYrblgBfByy2JrM",
            "100%sure",
            "a{{b",
            "changes",
            "your-secret-key-here",
        ):
            with self.subTest(token):
                self.write(hook(token=token))
                self.assertEqual(self.call("-i", str(self.path), "--check-config")[0], 0)

    def test_a_comment_in_a_token_file_is_not_a_token(self):
        tokens = self.folder / "tokens"
        tokens.write_text("# token of Central\n" + SECRET + "\n")
        tokens.chmod(0o600)
        self.write(hook(token=NOTHING, token_file="tokens"))
        code, stdout, _ = self.call("-i", str(self.path), "--check-config")
        self.assertEqual(code, 0)
        self.assertIn("tokens: 1", stdout)

    def test_a_variable_that_is_not_set_is_named(self):
        self.write(hook(token=NOTHING, token_file="${NOT_SET_ANYWHERE}/central"))
        code, _, stderr = self.call("-i", str(self.path), "--check-config")
        self.assertEqual(code, 78)
        self.assertIn("the variable NOT_SET_ANYWHERE is not set", stderr)


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
            self.assertEqual(len(lines), 5)
            for name, line in zip(names, lines):
                self.assertIn(name, line)

    def test_it_binds_nothing_and_makes_no_file(self):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            config = config_of(port=other.getsockname()[1], log_file="alerts.log")
            self.assertEqual(self.check(config)[0], 0)
        self.assertEqual(list(self.folder.iterdir()), [self.path])

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
            webhook=[{"name": "a", "token": SECRET}, {"name": "b", "token": SECRET}]
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


if __name__ == "__main__":
    unittest.main()
