"""The configuration: every mistake has one line that names its key, all at once, and never a
traceback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import central_webhook_client as product
from tests.support import (
    PATH,
    TOKEN,
    captured,
    config_of,
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
        with captured(sys.stdout, 1) as stdout, captured(sys.stderr, 2) as stderr:
            try:
                code = product.main(list(arguments))
            except SystemExit as end:
                code = end.code or 0
            texts = stdout(), stderr()
        self.assert_clean(*texts)
        return code, *texts

    def run_at_once(self, *runs):
        """Return exit code, stdout and stderr of processes that end by themselves, for each list of
        arguments.
        """
        results = run_at_once(*runs)
        for _, stdout, stderr in results:
            self.assert_clean(stdout, stderr)
        return results

    def run_with_each(self, *configs):
        """Return path, exit code, stdout and stderr of a process for each of these
        configurations.
        """
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
        """Return what is said of a wrong configuration, line by line, without what all begin
        with.
        """
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
        self.assertEqual(len(lines), 1)
        self.assertIn("[1]: nothing, [3]: another type", lines[0])

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
        url = "https://central.example.com/health"
        table.append((f"{HOOK}.path", new_central(public_url=url, path=NOTHING)))
        self.assert_mistakes(table)

    def test_of_api_key(self):
        key = f"{HOOK}.api_key"
        table = [
            (f"{key}.value", api_key(value=value))
            for value in (NOTHING, "", 5, None, [], [""], "<key>", f" {SECRET}", "a\nb")
        ]
        table += [
            (f"{key}.header", api_key(header=value))
            for value in ("X Key", "X-Key:", "X-K\xe9y", "X\n")
        ]
        table += [
            (f"{key}.header", api_key(header=NOTHING)),
            (f"{key}.header", api_key(field="apiKey")),
        ]
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
            webhooks = [
                changed({"name": "a", "path": f"/{number}", "token": SECRET}, change)
                for number, change in enumerate(changes)
            ]
            return config_of(webhook=webhooks)

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

    def test_two_webhooks_that_cannot_be_told_apart(self):
        def pair(first, second):
            usual = {"path": "/a", "token": SECRET}
            webhooks = [{"name": "a", **usual, **first}, {"name": "b", **usual, **second}]
            return config_of(webhook=[changed(webhook, {}) for webhook in webhooks])

        url = "https://central.example.com/a"
        new = {"type": "new-central", "public_url": url, "path": NOTHING}
        for first, second in (
            ({}, {}),
            ({"path": NOTHING}, {"path": "/b"}),
            ({"path": NOTHING}, {"path": NOTHING}),
            ({"token": [SECRET, SECRET + "1"]}, {"token": [SECRET + "2", SECRET]}),
            (new, {**new, "path": "/a"}),
        ):
            with self.subTest(first=first, second=second):
                lines = self.mistakes(pair(first, second))
                self.assertEqual(len(lines), 1, lines)
                self.assertIn(f"{HOOK}[1]: expected another path or token", lines[0])
        for second in ({"path": "/b"}, {"token": SECRET + "2"}, {"type": "mist"}):
            with self.subTest(second=second):
                self.assertEqual(self.check(pair({}, second))[0], 0)

    def test_an_object_that_is_missing_or_of_the_wrong_type_is_one_mistake(self):
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
            (f"{HOOK}.api_key", hook(api_key=SECRET)),
            (f"{HOOK}.oidc", hook(oidc=[])),
            ("the file", []),
            ("the file", [config_of()]),
        ):
            with self.subTest(key, config=config):
                lines = self.mistakes(config)
                self.assertEqual(len(lines), 1, lines)
                self.assertTrue(lines[0].startswith(f"{key}: expected an object"), lines)

    def test_a_host_is_an_address_or_a_name_that_resolves(self):
        wrong = (
            "[::1]",
            "http://localhost",
            "localhost:8010",
            "127.0.0.1:80",
            "a b",
            "127.0.0.1/8",
        )
        for host in (*wrong, "1.2.3.4.5", "a" * 70):
            with self.subTest(host):
                (line,) = self.mistakes(web(host=host))
                self.assertTrue(line.startswith("webclient_info.host: expected an address"), line)
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            with self.subTest(host):
                self.assertEqual(self.check(web(host=host))[0], 0)

    def test_trusted_proxies_are_addresses_and_networks(self):
        for value in ([], ["10.0.0.0/8"], ["192.0.2.7", "::1", "2001:db8::/32"]):
            with self.subTest(value):
                self.assertEqual(self.check(web(trusted_proxies=value))[0], 0)
        wrong = ("10.0.0.0/8", [5], ["10.0.0.1/8"], ["nginx"], [""], {}, True, [["::1"]], ["::1/x"])
        self.assert_mistakes(
            [("webclient_info.trusted_proxies", web(trusted_proxies=v)) for v in wrong]
        )

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
        # A hint looks at forged bodies with the same function; comparing each key with
        # each takes minutes.
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

    def test_a_common_mistake_in_json_is_named_with_its_place(self):
        good = json.dumps(hook(), indent=2)
        host = good.index('"host"')
        self.assertEqual(good.count("\n", 0, host), 2)
        for text, place, problem in (
            (
                good.replace('    "host"', '    // comment\n    "host"'),
                "line 3 column 5",
                "comment",
            ),
            (good.replace('    "host"', '    # comment\n    "host"'), "line 3 column 5", "comment"),
            (good.replace('    "host"', '    /* a */ "host"'), "line 3 column 5", "comment"),
            (good.replace("0\n  }", "0,\n  }"), "line 4 column 14", "a comma after the last"),
            (good.replace(f'"{SECRET}"', f'["{SECRET}",]'), "line 10", "a comma after the last"),
            (good.replace('"host"', "'host'"), "line 3 column 5", "single quotes"),
            (good.replace('"127.0.0.1"', "'127.0.0.1'"), "line 3 column 13", "single quotes"),
            (good.replace('"host"', "\u201chost\u201d"), "line 3 column 5", "typographic"),
            (good.replace('"host"', '"host\u201d'), "line 3", "typographic"),
            (
                good.replace('"127.0.0.1"', "\u201e127.0.0.1\u201c"),
                "line 3 column 13",
                "typographic",
            ),
            (good.replace('    "host"', '\u00a0   "host"'), "line 3 column 1", "no-break space"),
            (good.replace('"127.0.0.1"', '"C:\\alerts"'), "line 3 column 16", "backslash"),
            (good.replace('"127.0.0.1"', '"C:\\users"'), "line 3", "backslash"),
            (good.replace('"127.0.0.1"', '"127.0.0.1'), "line 3", "closing quote"),
            (good.replace(",", "", 1), "line 4 column 5", "expecting ',' delimiter"),
            (good.replace(":", "", 1), "line 2 column 20", "expecting ':' delimiter"),
            (good.replace('"host"', "host"), "line 3 column 5", "name enclosed in double quotes"),
            (good.replace('"127.0.0.1"', "True"), "line 3 column 13", "expecting value"),
            (good + "}", "line 13 column 2", "extra data"),
            (good[:-1], "line 13 column 1", "expecting ',' delimiter"),
            ("{", "line 1 column 2", "name enclosed in double quotes"),
            ("", "line 1 column 1", "expecting value"),
            ("\n\n", "line 3 column 1", "expecting value"),
            (good.encode("utf-16"), "", "UTF-16: save the file as UTF-8"),
            (good.encode("utf-16-le"), "", "UTF-16: save the file as UTF-8"),
            (good.encode().replace(b"noc", b"n\xff"), "line 8", "save the file as UTF-8"),
        ):
            with self.subTest(problem, text=text):
                (line,) = self.mistakes(text)
                self.assertTrue(line.startswith(place), line)
                self.assertIn(problem, line)

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
            b"\0",
        ):
            with self.subTest(text[:20]):
                self.assertEqual(len(self.mistakes(text)), 1)

    def test_a_byte_order_mark_windows_lines_and_tabs_are_fine(self):
        text = json.dumps(hook(), indent="\t").replace("\n", "\r\n")
        self.assertEqual(self.check(b"\xef\xbb\xbf" + text.encode())[0], 0)

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
            (hook(path="/health"), "/metrics", '"/health"'),
            (web(host="[::1]"), "brackets", '"[::1]"'),
            (web(log_file="C:\talerts"), "backslash", '"C:\\talerts"'),
            (web(trusted_proxies=["10.0.0.1/8"]), "networks", "host bits"),
            (web(trusted_proxies="10.0.0.1"), "array", '"10.0.0.1"'),
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
        self.assertIn("the variable TESTS_FOLDER is not set", lines[0])

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
        for mistake in (SECRET, f"{SECRET} ", f"{SECRET}/x==", f"x/{SECRET}"):
            with self.subTest("a token in place of its file", mistake=mistake):
                self.assert_names(
                    self.mistakes(hook(token=NOTHING, token_file=mistake)), f"{HOOK}.token_file"
                )
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

    def test_the_folders_of_systemd_and_of_containers_get_no_warning(self):
        credentials = self.folder / "credentials"
        credentials.mkdir()
        path = credentials / "central"
        path.write_text(SECRET)
        path.chmod(0o444)
        config = hook(token=NOTHING, token_file="${CREDENTIALS_DIRECTORY}/central")
        before = os.environ.get("CREDENTIALS_DIRECTORY")
        os.environ["CREDENTIALS_DIRECTORY"] = str(credentials)
        try:
            self.assertEqual(self.warnings(config, 0o600), [])
            os.environ["CREDENTIALS_DIRECTORY"] = str(self.folder / "other")
            config = hook(token=NOTHING, token_file="credentials/central")
            self.assertEqual(len(self.warnings(config, 0o600)), 1)
        finally:
            os.environ.pop("CREDENTIALS_DIRECTORY")
            if before is not None:
                os.environ["CREDENTIALS_DIRECTORY"] = before

    def test_it_is_the_file_that_holds_the_token_that_counts(self):
        path = self.folder / "token"
        path.write_text(SECRET)
        for mode, warned in ((0o600, 0), (0o644, 1)):
            path.chmod(mode)
            lines = self.warnings(hook(token=NOTHING, token_file="token"), 0o644)
            with self.subTest(oct(mode)):
                self.assertEqual(len(lines), warned, lines)
                self.assertTrue(all(str(path) in line for line in lines))


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
    "REPLACE_WITH_TOKEN",
    "insert-token-here",
    "changeme123",
    "$(cat /run/token)",
    "%(token)s",
    "{token}",
    "[token]",
    "@@TOKEN@@",
    "__TOKEN__",
    "$env:TOKEN",
    "TBD",
    "...",
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
                        f"{HOOK}.{key}: expected a secret or an array of secrets, "
                        "found a placeholder\n",
                        stderr,
                    )

    def test_a_real_secret_is_not_taken_for_a_placeholder(self):
        for token in (
            "zSMrzuYrblgBfByy2JrM",
            "100%sure",
            "a{{b",
            "changes",
            "your-secret-key-here",
            "replacement",
            "%abc",
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
