"""nginx/centralwebhook.conf in a real nginx, with TLS, before real receivers.

Only its ports, addresses, paths and host name are replaced. Lines that it has commented out are
switched on and tested too.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import hmac
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

from central_webhook_client import read_config

from ..support import (
    PATH,
    PROGRAM,
    TOKEN,
    TOP,
    Connection,
    Receiver,
    central_headers,
    config_of,
    deadline_poll,
    new_body,
    raw_request,
)
from . import parts

CONF = TOP / "nginx" / "centralwebhook.conf"
MEBIBYTE = 1 << 20
LONG_ACCESS_TOKEN = "0123456789" * 1200  # 12 KB
LOAD_BALANCER = "127.0.0.8"
SEVERAL = ("least_conn", "server")  # lines to switch on: those for several receivers
BALANCED = ("set_real_ip_from", "real_ip_header")  # those for a load balancer in front
OPTIONAL = (*SEVERAL, *BALANCED, "location", "allow", "deny")
MAIN_CONF = """
daemon off;
worker_processes 2;
pid pid;
error_log error.log notice;
events { worker_connections 768; }
http {
    access_log access.log;
    proxy_temp_path proxy;
    client_body_temp_path client_body;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include site.conf;
}
"""

NGINX = CERTIFICATES = RECEIVER = PROXY = None


def setUpModule():
    global NGINX, CERTIFICATES, RECEIVER, PROXY
    NGINX = parts.need_program("nginx")
    parts.need_program("openssl")
    CERTIFICATES = Path(tempfile.mkdtemp(prefix="certificates-"))
    unittest.addModuleCleanup(shutil.rmtree, CERTIFICATES, ignore_errors=True)
    parts.make_certificates(CERTIFICATES)
    webhooks = [
        {"name": "noc", "path": PATH, "token": TOKEN},
        {
            "name": "new",
            "type": "new-central",
            "token": "new-token",
            "public_url": "https://localhost" + PATH,
        },
        {
            "name": "keyed",
            "path": PATH,
            "token": "keyed-token",
            "api_key": {"header": "Authorization", "value": LONG_ACCESS_TOKEN},
        },
    ]
    RECEIVER = enter_module(Receiver(config_of(webhook=webhooks, max_connections=8)))
    PROXY = enter_module(Nginx(RECEIVER.port))


def enter_module(manager):
    """Enter a context that ends with the module; unittest.enterModuleContext needs Python 3.11."""
    result = manager.__enter__()
    unittest.addModuleCleanup(manager.__exit__, None, None, None)
    return result


def has_ipv6():
    try:
        parts.free_ports(1, "::1")
    except OSError:
        return False
    return True


class Nginx:
    """A running nginx with our file, its ports, paths and host name replaced."""

    def __init__(self, *receiver_ports, switch_on=(), receiver_host="127.0.0.1"):
        self.receiver_ports, self.switch_on = receiver_ports, switch_on
        self.receiver_host = receiver_host
        self.folder = Path(tempfile.mkdtemp(prefix="nginx-"))
        self.process = None

    def site(self):
        """Return our file with the ports, paths and host name of this test."""
        text = CONF.read_text()
        replacements = [
            ("/etc/letsencrypt/live/webhook.example.com/", f"{CERTIFICATES}/"),
            ("webhook.example.com", "localhost"),
            ("listen 80;", f"listen 127.0.0.1:{self.http_port};"),
            ("listen 443 ssl;", f"listen 127.0.0.1:{self.https_port} ssl;"),
            ("listen [::]:80;", f"listen [::1]:{self.http_port};" if has_ipv6() else ""),
            ("listen [::]:443 ssl;", f"listen [::1]:{self.https_port} ssl;" if has_ipv6() else ""),
            ("server 127.0.0.1:8010", f"server {self.receiver_host}:{self.receiver_ports[0]}"),
            ("server 127.0.0.1:8011", f"server 127.0.0.1:{self.receiver_ports[-1]}"),
            ("set_real_ip_from 192.0.2.0/24;", f"set_real_ip_from {LOAD_BALANCER};"),
        ]
        for old, new in replacements:
            if old not in text:
                raise AssertionError(f"{CONF.name} has no {old!r} any more")
            text = text.replace(old, new)
        for name in self.switch_on:
            text, count = re.subn(rf"^( *)#({name}\b)", r"\1\2", text, flags=re.MULTILINE)
            if not count:
                raise AssertionError(f"{CONF.name} has no commented {name!r} any more")
        return text

    def write(self):
        """Write the configuration, with ports that are free at this moment."""
        self.http_port, self.https_port = parts.free_ports(2)
        (self.folder / "site.conf").write_text(self.site())
        user = "user root;\n" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(user + MAIN_CONF)

    def command(self, *arguments):
        folder = ["-p", str(self.folder)]  # names are relative to it
        return [NGINX, *folder, "-e", "error.log", "-c", "nginx.conf", *arguments]

    def __enter__(self):
        for _ in range(5):  # somebody else may take a port before nginx does
            self.write()
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            if (
                deadline_poll(lambda: self.is_up() or self.process.poll() is not None)
                and self.process.poll() is None
            ):
                return self
        log = (self.folder / "error.log").read_text()
        self.__exit__()
        raise AssertionError(f"nginx does not start: {log}")

    def is_up(self):
        return (
            (self.folder / "pid").exists()
            and self.accepts(self.http_port)
            and self.accepts(self.https_port)
        )

    @staticmethod
    def accepts(port):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def connect(self, **options):
        return TlsConnection(self.https_port, **options)

    def request(self, data, **options):
        """Send raw bytes on a new connection; return the answer."""
        with self.connect(**options) as connection:
            connection.send(data)
            return connection.read()

    def deliver(self, body=None, source="127.0.0.1", **options):
        """Send a signed delivery on a new connection; return the answer."""
        return self.request(signed_delivery(body, **options), source=source)


class TlsConnection(Connection):
    """A connection over TLS that trusts the authority of the test and nobody else."""

    def __init__(self, port, source="127.0.0.1", timeout=15.0, context=None):
        context = context or ssl.create_default_context(cafile=str(CERTIFICATES / "authority.pem"))
        raw = socket.create_connection(("127.0.0.1", port), timeout, (source, 0))
        try:
            self.socket = context.wrap_socket(raw, server_hostname="localhost")
        except BaseException:
            raw.close()
            raise
        self.buffer = b""


def signed_delivery(body=None, path=PATH, token=TOKEN, fields=(), **options):
    """Return a signed delivery of classic Central, as bytes; `fields` are further header fields."""
    body = new_body() if body is None else body
    headers = {**central_headers(body, token), **dict(fields)}
    return raw_request("POST", path, headers, body, **options)


class FileTest(unittest.TestCase):
    """The file itself."""

    def test_nginx_accepts_the_file_without_a_warning_as_it_is_and_with_each_option_switched_on(
        self,
    ):
        for switch_on in ((), SEVERAL, BALANCED, OPTIONAL):
            with self.subTest(switch_on=switch_on):
                nginx = Nginx(1, 2, switch_on=switch_on)
                self.addCleanup(shutil.rmtree, nginx.folder)
                nginx.write()
                done = subprocess.run(
                    nginx.command("-t"), capture_output=True, text=True, timeout=30
                )
                self.assertEqual(
                    (0, []),
                    (done.returncode, re.findall(r"\[(?:warn|error|emerg)\].*", done.stderr)),
                )

    def test_its_size_limit_is_the_default_of_the_receiver(self):
        config = read_config(json.dumps(config_of()).encode())
        size, unit = re.search(
            r"^ *client_max_body_size (\d+)([km]);", CONF.read_text(), re.MULTILINE
        ).groups()
        self.assertEqual(config.max_body_bytes, int(size) * {"k": 1 << 10, "m": MEBIBYTE}[unit])

    def test_idle_connections_are_closed_by_the_side_that_sends_requests(self):
        upstream, server = map(int, re.findall(r"\bkeepalive_timeout (\d+)s;", CONF.read_text()))
        self.assertLess(upstream, 75)  # the receiver's limit
        self.assertGreater(server, 60)  # the default of load balancers of AWS


class DeliveryTest(unittest.TestCase):
    """One receiver behind nginx."""

    def test_a_signed_delivery_is_accepted(self):
        answer = PROXY.deliver()
        self.assertEqual((200, {"status": "ok"}), (answer.status, answer.json))

    def test_a_forged_delivery_is_refused_by_the_receiver(self):
        body = new_body()
        answer = PROXY.request(
            raw_request("POST", PATH, central_headers(body), body.replace(b"Major", b"Minor"))
        )
        self.assertEqual((401, {"error": "unauthorized"}), (answer.status, answer.json))
        self.assertIn("www-authenticate", answer.headers)

    def test_a_body_of_the_size_limit_is_accepted_and_one_byte_more_is_413(self):
        for size, status in ((MEBIBYTE, 200), (MEBIBYTE + 1, 413)):
            with self.subTest(size):
                self.assertEqual(status, PROXY.deliver(new_body().ljust(size)).status)

    def test_a_chunked_delivery_is_accepted_and_one_above_the_size_limit_is_413(self):
        for body, size, status in ((new_body(), 7, 200), (b"0" * (MEBIBYTE + 1), 1 << 16, 413)):
            with self.subTest(status):
                headers = {**central_headers(body), "Transfer-Encoding": "chunked"}
                parts_of_body = [body[i : i + size] for i in range(0, len(body), size)]
                chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts_of_body]
                head = raw_request("POST", PATH, headers, length=False)
                answer = PROXY.request(head + b"".join(chunks) + b"0\r\n\r\n")
                self.assertEqual(status, answer.status)

    def test_every_other_path_is_404_of_nginx(self):
        below = ("/centralwebhook/", "/centralwebhook/x")
        for path in ("/", *below, "/centralwebhoo", "/Centralwebhook", "/x/centralwebhook"):
            with self.subTest(path):
                answer = PROXY.deliver(path=path)
                self.assertEqual((404, {"error": "404 by nginx"}), (answer.status, answer.json))

    def test_health_and_metrics_are_not_exposed_however_they_are_spelled(self):
        for path in ("/health", "/metrics"):
            self.assertEqual(200, RECEIVER.request(raw_request("GET", path, length=False)).status)
            spellings = (
                path,
                path + "?x",
                "/" + path,
                path + "/",
                "/%" + path[1:2].encode().hex() + path[2:],
                "/centralwebhook/.." + path,
                path + "/../centralwebhook",
                path + "?/../centralwebhook",
                path + "%3f/../centralwebhook",
                "http://localhost" + path,
            )
            for method in ("GET", "HEAD", "POST"):
                for spelling in spellings:
                    with self.subTest(method=method, path=spelling), PROXY.connect() as connection:
                        connection.send(raw_request(method, spelling))
                        answer = connection.read(head_only=method == "HEAD")
                        self.assertIn(answer.status, (400, 403, 404))
                        self.assertNotIn(b"central_webhook_", answer.body)

    def test_a_method_other_than_post_is_refused_by_nginx(self):
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):
            with self.subTest(method):
                answer = PROXY.request(raw_request(method, PATH))
                self.assertEqual((403, {"error": "403 by nginx"}), (answer.status, answer.json))

    def test_no_answer_names_a_version(self):
        for path in (PATH, "/"):
            with self.subTest(path):
                answer = PROXY.request(raw_request("POST", path))
                self.assertEqual("nginx", answer.headers["server"])
                self.assertNotRegex(answer.body, rb"nginx/|Python")

    def test_an_access_token_of_12_kilobytes_gets_to_the_receiver(self):
        for access_token, status in ((LONG_ACCESS_TOKEN[:-1], 401), (LONG_ACCESS_TOKEN, 200)):
            with self.subTest(status):
                fields = {"Authorization": f"Bearer {access_token}"}
                answer = PROXY.deliver(token="keyed-token", fields=fields)
                self.assertEqual(status, answer.status)

    def test_header_fields_and_targets_that_are_too_long_are_refused(self):
        answer = PROXY.deliver(fields={"X-Large": "x" * 17_000})
        self.assertEqual((400, {"error": "400 by nginx"}), (answer.status, answer.json))
        for length in (9_000, 17_000):  # the receiver's limit, and nginx's
            with self.subTest(length):
                self.assertEqual(414, PROXY.deliver(path=f"{PATH}?{'x' * length}").status)

    def test_a_malformed_request_is_never_a_5xx(self):
        for request, status in (
            (b"GARBAGE\r\n\r\n", 400),
            (b"POST /%zz HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
            (b"POST /../.. HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
            (b"post / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\n\r\n", 400),
            (b"POST /refused-by-nginx HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ):
            with self.subTest(request):
                answer = PROXY.request(request)
                expected = (status, {"error": f"{status} by nginx"})
                self.assertEqual(expected, (answer.status, answer.json))

    def test_plain_http_is_led_to_https_and_to_nothing_else(self):
        for path in (PATH, PATH + "?a=b", "/health", "/"):
            for host in ("localhost", "evil.example"):
                with self.subTest(path=path, host=host), Connection(PROXY.http_port) as connection:
                    connection.send(signed_delivery(path=path, host=host))
                    answer = connection.read()
                    self.assertEqual(
                        (308, "https://localhost" + path),
                        (answer.status, answer.headers["location"]),
                    )

    def test_fifty_alerts_in_a_row_over_one_connection_are_all_accepted(self):
        with PROXY.connect() as connection:
            for _ in range(50):
                connection.send(signed_delivery())
                self.assertEqual(200, connection.read().status)

    def test_two_hundred_alerts_at_once_over_as_many_connections_are_all_accepted(self):
        with Receiver() as receiver, Nginx(receiver.port) as proxy:
            connections = [proxy.connect() for _ in range(200)]
            try:
                for connection in connections:
                    connection.send(signed_delivery())
                self.assertEqual(
                    [200] * 200, [connection.read().status for connection in connections]
                )
            finally:
                for connection in connections:
                    connection.socket.close()

    def test_a_flood_of_one_address_is_refused_while_others_are_served(self):
        request, refused = raw_request("GET", PATH), 0
        for _ in range(4):  # nginx closes a connection after 1000 requests
            with PROXY.connect(source="127.0.0.9") as connection:
                connection.send(request * 500)
                statuses = [connection.read().status for _ in range(500)]
            refused += statuses.count(429)
            self.assertLessEqual(set(statuses), {403, 429})
        self.assertGreater(refused, 200)
        self.assertEqual(200, PROXY.deliver().status)

    def test_senders_that_stop_within_the_body_hold_no_connection_of_the_receiver(self):
        delivery = signed_delivery()
        slow = [
            PROXY.connect() for _ in range(20)
        ]  # more than the receiver takes (max_connections is 8)
        try:
            for connection in slow:
                connection.send(delivery[:-5])
            for _ in range(10):
                self.assertEqual(200, PROXY.deliver().status)
            question = raw_request("GET", "/metrics", length=False)
            alone = re.compile(rb"^\w*in_flight\w* 1$", re.MULTILINE)  # the question itself
            deadline_poll(
                lambda: alone.search(RECEIVER.request(question).body), message="more are in flight"
            )
            slow[0].send(delivery[-5:-2])
            slow[0].send(delivery[-2:])
            self.assertEqual(200, slow[0].read().status)
        finally:
            for connection in slow:
                connection.socket.close()

    def test_a_sender_of_new_central_is_verified_with_the_url_as_typed_not_with_host_and_port(self):
        date, created = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()), int(time.time())
        url = f"https://localhost{PATH}"
        parameters = (
            f'("@method" "@target-uri" "@authority" "@scheme" "@path" "date");created={created}'
        )
        base = (
            f'"@method": POST\n"@target-uri": {url}?a=%20b\n"@authority": localhost\n'
            f'"@scheme": https\n"@path": {PATH}\n"date": {date}\n"@signature-params": {parameters}'
        )
        signature = base64.b64encode(
            hmac.new(b"new-token", base.encode(), hashlib.sha256).digest()
        ).decode()
        headers = {
            "Date": date,
            "Signature-Input": "sig1=" + parameters,
            "Signature": f"sig1=:{signature}:",
        }
        host = f"localhost:{PROXY.https_port}"
        for query, status in (("?a=%20b", 200), ("?a=+b", 401)):
            with self.subTest(query):
                answer = PROXY.request(
                    raw_request("POST", PATH + query, headers, new_body(), host=host)
                )
                self.assertEqual(status, answer.status)

    def test_a_receiver_that_is_down_is_502_and_one_that_is_back_is_used_at_once(self):
        with Receiver() as receiver, Nginx(receiver.port) as proxy:
            self.assertEqual(200, proxy.deliver().status)
            self.assertEqual(0, receiver.stop())
            answer = proxy.deliver()
            self.assertEqual((502, {"error": "502 by nginx"}), (answer.status, answer.json))
            with Receiver(config_of(port=receiver.port)):
                self.assertEqual(200, proxy.deliver().status)


class LoggedSenderTest(unittest.TestCase):
    """Which sender the receiver's log names.

    Each test has receivers of its own, since their logs show only ten rejections a second.
    """

    def logged_senders(self, deliveries, host="127.0.0.1", switch_on=(), **webclient_info):
        """Send forged deliveries, (source, X-Forwarded-For) each; return the senders in the log."""
        found = []
        with (
            Receiver(config_of(host=host, **webclient_info)) as receiver,
            Nginx(receiver.port, receiver_host=host, switch_on=switch_on) as proxy,
        ):
            for source, forwarded in deliveries:
                start = len(receiver.stderr_lines)
                fields = {"X-Forwarded-For": forwarded} if forwarded else {}
                answer = proxy.deliver(token="another-token", fields=fields, source=source)
                self.assertEqual(401, answer.status)
                line = receiver.wait_for_log(" 401 ", start=start)
                found += re.findall(r"\b\d+(?:\.\d+){3}\b", line)
        return found

    def test_it_is_the_one_that_nginx_saw_and_not_one_that_the_sender_claims(self):
        claims = (None, "203.0.113.9", "203.0.113.9, ::1")
        found = self.logged_senders([("127.0.0.5", claim) for claim in claims])
        self.assertEqual(["127.0.0.5"] * 3, found)

    def test_behind_a_load_balancer_it_is_the_one_that_the_load_balancer_saw(self):
        deliveries = [
            (LOAD_BALANCER, "203.0.113.9"),
            (LOAD_BALANCER, "198.51.100.1, 203.0.113.9"),  # the first entry is a claim
            (LOAD_BALANCER, "203.0.113.9:50123"),
            ("127.0.0.5", "203.0.113.9"),  # not through the load balancer
        ]
        found = self.logged_senders(deliveries, switch_on=BALANCED)
        self.assertEqual(["203.0.113.9"] * 3 + ["127.0.0.5"], found)

    def test_a_receiver_on_another_host_names_it_if_it_trusts_the_address_of_nginx(self):
        for trusted, expected in (("127.0.0.1", "127.0.0.5"), ("192.0.2.1", "127.0.0.1")):
            with self.subTest(trusted):
                found = self.logged_senders(
                    [("127.0.0.5", None)], host="127.0.0.10", trusted_proxies=[trusted]
                )
                self.assertEqual([expected], found)


class TlsTest(unittest.TestCase):
    """What TLS nginx speaks."""

    def handshake(self, version):
        context = ssl.create_default_context(cafile=str(CERTIFICATES / "authority.pem"))
        context.set_ciphers("DEFAULT@SECLEVEL=0")  # else this side refuses TLS 1.1 itself
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = version
        with PROXY.connect(context=context) as connection:
            return connection.socket.version()

    def test_tls_1_2_and_1_3_are_spoken(self):
        self.assertEqual("TLSv1.2", self.handshake(ssl.TLSVersion.TLSv1_2))
        self.assertEqual("TLSv1.3", self.handshake(ssl.TLSVersion.TLSv1_3))

    def test_tls_1_1_is_refused_by_nginx(self):
        with (
            self.assertWarnsRegex(DeprecationWarning, "TLSv1_1")
            if sys.version_info >= (3, 10)
            else self.subTest()
        ):
            with self.assertRaises(ssl.SSLError) as caught:
                self.handshake(ssl.TLSVersion.TLSv1_1)
        self.assertEqual(
            "TLSV1_ALERT_PROTOCOL_VERSION", caught.exception.reason
        )  # the other side said so

    def test_ciphers_without_authenticated_encryption_are_refused(self):
        context = ssl.create_default_context(cafile=str(CERTIFICATES / "authority.pem"))
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE+SHA1:ECDHE+SHA256:!AESGCM:@SECLEVEL=0")
        with self.assertRaises(ssl.SSLError) as caught:
            PROXY.connect(context=context)
        self.assertIn("HANDSHAKE_FAILURE", caught.exception.reason)


class SendSampleTest(unittest.TestCase):
    """`--send-sample` proves the whole way."""

    def send(self, path, authority=None):
        """Run it; return its exit code, stdout and stderr."""
        command = [sys.executable, str(PROGRAM), f"-i={RECEIVER.config_path}", "--webhook", "noc"]
        done = subprocess.run(
            [*command, "--send-sample", f"https://localhost:{PROXY.https_port}{path}"],
            env={**os.environ, "SSL_CERT_FILE": str(authority or CERTIFICATES / "authority.pem")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    def test_it_exits_0_on_200_through_nginx_if_the_certificate_is_trusted(self):
        code, stdout, stderr = self.send(PATH)
        self.assertEqual(0, code, stderr)
        self.assertRegex(stdout, r"^200 .*ok")

    def test_it_exits_1_if_the_certificate_is_not_trusted(self):
        code, _, stderr = self.send(PATH, authority=os.devnull)
        self.assertEqual(1, code, stderr)
        self.assertRegex(stderr, "(?i)certificate|ssl")
        self.assertNotIn("Traceback", stderr)

    def test_it_exits_1_on_another_status(self):
        code, stdout, stderr = self.send("/x")
        self.assertEqual(1, code, stderr)
        self.assertIn("404", stdout + stderr)


class SeveralReceiversTest(unittest.TestCase):
    """Two receivers behind one nginx: the lines of the file that are commented out."""

    def test_no_delivery_is_refused_or_kept_twice_while_they_restart_one_after_the_other(self):
        stop, statuses = threading.Event(), []

        def send(proxy, source):
            connection = proxy.connect(source=source)
            while not stop.wait(0.02):  # within the limit of requests of one address
                connection.send(signed_delivery())
                answer = connection.read()
                statuses.append(answer.status)
                if answer.headers.get("connection") == "close":
                    connection.socket.close()
                    connection = proxy.connect(source=source)
            connection.socket.close()

        with contextlib.ExitStack() as stack:
            lives = [stack.enter_context(Receiver()) for _ in range(2)]  # the last two are alive
            proxy = stack.enter_context(
                Nginx(*(receiver.port for receiver in lives), switch_on=SEVERAL)
            )
            senders = [
                threading.Thread(target=send, args=(proxy, f"127.0.0.{20 + number}"))
                for number in range(4)
            ]
            for sender in senders:
                sender.start()
            try:
                for _ in range(8):
                    older = lives[-2]
                    deadline_poll(
                        lambda life=older: len(life.stdout_lines) > 3, 15, "it gets nothing"
                    )
                    self.assertEqual(0, older.stop())
                    lives.append(stack.enter_context(Receiver(config_of(port=older.port))))
            finally:
                stop.set()
                for sender in senders:
                    sender.join(20)
            self.assertEqual({200: len(statuses)}, collections.Counter(statuses))
            for receiver in lives[-2:]:
                receiver.stop()
            self.assertEqual(len(statuses), sum(len(receiver.stdout_lines) for receiver in lives))
