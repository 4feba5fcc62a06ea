"""Measure the receiver beside what one would build instead, and print one Markdown table.

    python3 -m tests.benchmark [--quick] [--rounds N] [--deliveries N] [--only FIGURE ...]
        [--old FILE]

Side by side: our program; FastAPI on uvicorn (one worker, httptools, uvloop); a naive
http.server; and the floor, an epoll loop in Python with next to no HTTP. All do the same job
(job.py): verify a POST of classic Central with a body of 1.2 KB, remember it, write its line to
stdout (a file), answer 200. The servers take turns within each round, on the same signed
deliveries; a ratio is taken within a round, and the table has the medians over the rounds.
Every delivery is different; every answer is checked, and every 200 must have exactly one line
in the server's output.

CPU is user and system time of the server's process alone, read from its CPU clock before and
after the load. The load comes from load.c, compiled when it is needed. Needs Linux, a C
compiler, PyPI (once: the peers go into a virtual environment of their own) and, for the figures
behind a proxy, nginx; Python 3.11 or newer for the peers.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import hashlib
import hmac
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmark.job import PATH, TOKEN
from tests.benchmark.proxy import Proxy

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
PROGRAM = TOP / "central_webhook_client.py"
BODY_BYTES = 1200
WARM_UP = 200  # deliveries before a measurement
BURST = 1000
PATIENCE_SECONDS = 10  # without an answer for so long, a delivery counts as lost
RECORD = struct.Struct("dii")  # of load.c: seconds, status, number of the connection
_ID = re.compile(rb'"delivery_id": "([^"]*)"')


def say(text):
    """Tell how far it is; the table alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def read_requests(file, count):
    """Return the first requests of a file for load.c."""
    data = Path(file).read_bytes()
    requests = []
    place = 0
    for _ in range(count):
        (length,) = struct.unpack_from("=I", data, place)
        requests.append(data[place + 4 : place + 4 + length])
        place += 4 + length
    return requests


# ---- Deliveries, signed before anything is measured --------------------------


def delivery_id(number):
    """Return the X-Central-Delivery-ID of a delivery."""
    return f"72d3162e-cc78-11e3-81ab-{number:012d}"


def sign_delivery(number, path=PATH, token=TOKEN, close=False, body_bytes=BODY_BYTES):
    """Return a whole request as classic Central sends it."""
    alert = {
        "id": f"AW{number:016d}",
        "nid": 4,
        "alert_type": "AP disconnected",
        "timestamp": 1763760000 + number,
        "state": "Open",
        "severity": "Critical",
        "setting_id": "0123456789abcdef-4",
        "device_id": f"CN{number:08d}",
        "description": f"AP with name ap-{number} and MAC address 00:1a:1e:00:00:01 disconnected",
        "details": {
            "hostname": f"ap-{number}",
            "serial": f"CN{number:08d}",
            "site": "Main building",
        },
        "operation": "create",
        "text": "",
        "webhook": "6c5b3b0e-5b0e-4c0e-9b0e-2b0e6c5b3b0e",
    }
    alert["text"] = "x" * max(0, body_bytes - len(json.dumps(alert)))
    body = json.dumps(alert).encode()
    service, stamp = "Alerts", time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    signed = body + f"{service}{delivery_id(number)}{stamp}".encode()
    signature = base64.b64encode(hmac.new(token.encode(), signed, hashlib.sha256).digest()).decode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: webhooks.example.com\r\n"
        "User-Agent: python-requests/2.31.0\r\n"
        "Accept-Encoding: gzip, deflate\r\nAccept: */*\r\n"
        f"{'Connection: close' + chr(13) + chr(10) if close else ''}"
        f"Content-Type: application/json\r\nX-Central-Service: {service}\r\n"
        f"X-Central-Event: AP-Disconnected\r\nX-Central-Delivery-ID: {delivery_id(number)}\r\n"
        f"X-Central-Delivery-Timestamp: {stamp}\r\n"
        "X-Central-Customer-ID: 0123456789abcdef0123456789abcdef\r\n"
        f"X-Central-Signature: {signature}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


# ---- Servers ---------------------------------------------------------------------


def free_port():
    """Return a port that nobody uses at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def cpu_seconds(pid):
    """Return user and system time of a process, all its threads included
    (clock_getcpuclockid(3)).
    """
    return time.clock_gettime((~pid << 3) | 2)


def memory_of(pid, name):
    """Return VmRSS or VmHWM of a process in MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024


class Server:
    """One running server: its process, port, output, and the deliveries that it has answered with
    200.
    """

    def __init__(self, bench, kind, webhooks=None, log_file=False, max_connections=None):
        self.kind, self.port, self.answered = kind, free_port(), []
        self.folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=bench.folder))
        self.log_file = self.folder / "deliveries.log" if log_file else None
        if kind in bench.programs:
            path = self.write_config(webhooks, max_connections)
            command = [bench.python, str(bench.programs[kind]), f"-i={path}"]
        else:
            command = [bench.python, str(HERE / f"peer_{kind}.py"), str(self.port)]
        self.output = open(self.folder / "stdout", "wb")
        self.errors = open(self.folder / "stderr", "wb")
        began = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=self.output, stderr=self.errors, cwd=self.folder
        )
        try:
            self.wait_until_it_answers(bench.probe, began + 30)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - began
        self.pid = self.process.pid

    def write_config(self, webhooks, max_connections):
        """Write the configuration of our program."""
        web = {"host": "127.0.0.1", "port": self.port}
        if self.log_file:
            web["log_file"] = str(self.log_file)
        if max_connections:
            web["max_connections"] = max_connections
        webhooks = webhooks or {"name": "noc", "path": PATH, "token": TOKEN}
        path = self.folder / "input_info.json"
        path.write_text(json.dumps({"webclient_info": web, "central_info": {"webhook": webhooks}}))
        path.chmod(0o600)
        return path

    def wait_until_it_answers(self, request, deadline):
        """Send a delivery again and again until it is answered."""
        while True:
            address = ("127.0.0.1", self.port)
            with contextlib.suppress(OSError), socket.create_connection(address, 10) as connection:
                connection.sendall(request)
                if connection.recv(65536)[9:12] == b"200":
                    return
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(
                    f"{self.kind} did not start: {(self.folder / 'stderr').read_text()[-2000:]}"
                )
            time.sleep(0.001)

    def stop(self):
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()
        self.errors.close()

    def check_lines(self):
        """Check that each delivery that was answered with 200 has exactly one line wherever it has
        to be.
        """
        for path in filter(None, (self.folder / "stdout", self.log_file)):
            found = collections.Counter(_ID.findall(path.read_bytes()))
            wrong = [number for number in self.answered if found[delivery_id(number).encode()] != 1]
            if wrong:
                raise SystemExit(
                    f"{self.kind}: {len(wrong)} answered without exactly one line in {path}"
                )


class Load:
    """The outcome of one run of the load generator."""

    def __init__(self, records, summary):
        self.seconds, self.generator_cpu = summary["seconds"], summary["cpu"]
        self.statuses = collections.Counter(status for _, status, _ in records)
        self.latencies = sorted(seconds for seconds, status, _ in records if status == 200)
        self.within_a_second = sum(seconds <= 1 for seconds in self.latencies)
        self.cpu = 0.0  # of the server, filled in by who knows it

    def latency_ms(self, share):
        """Return a quantile of the latency in milliseconds."""
        return 1000 * self.latencies[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


class Bench:
    """What all measurements share: options, tools, signed requests, and the samples taken so
    far.
    """

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.programs = {}  # copies, so that an edit meanwhile changes nothing
        for kind, path in (("ours", PROGRAM), ("old", options.old)):
            if path:
                self.programs[kind] = folder / kind / PROGRAM.name
                self.programs[kind].parent.mkdir()
                shutil.copyfile(path, self.programs[kind])
        self.kinds = [*self.programs, "fastapi", "naive", "floor"]
        self.rivals = [*self.programs, "fastapi"]
        self.generator = folder / "load"
        subprocess.run(
            [os.environ.get("CC", "cc"), "-O2", "-o", self.generator, HERE / "load.c"], check=True
        )
        self.python = make_environment(
            Path(options.venv).expanduser()
        )  # of all four: start and memory depend on it
        self.samples = collections.defaultdict(list)  # (figure, kind): a value for each round
        self.files = {}
        self.probe = sign_delivery(0, close=True)

    def requests(self, name, **how):
        """Return a file of signed requests, made when it is first asked for."""
        if name not in self.files:
            say(f"signing: {name}")
            count = how.pop("count", self.options.deliveries + WARM_UP + 1)
            paths = how.pop("paths", [PATH])
            self.files[name] = self.folder / f"requests-{name}"
            with open(self.files[name], "wb") as file:
                for number in range(1, count + 1):
                    request = sign_delivery(number, path=paths[number % len(paths)], **how)
                    file.write(struct.pack("=I", len(request)) + request)
        return self.files[name]

    def load(
        self,
        server,
        file,
        *,
        mode="keep",
        connections=8,
        first=0,
        count=None,
        port=None,
        all_200=True,
    ):
        """Run the load generator; return a Load. With `all_200`, any other answer ends the
        benchmark.
        """
        count = self.options.deliveries if count is None else count
        answers = server.folder / "answers"
        before = cpu_seconds(server.pid)
        span = [first, count, PATIENCE_SECONDS]
        command = [self.generator, port or server.port, connections, mode, *span, file, answers]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
        cpu = cpu_seconds(server.pid) - before
        records = list(RECORD.iter_unpack(answers.read_bytes()))
        server.answered += [
            first + number + 1 for number, record in enumerate(records) if record[1] == 200
        ]
        result = Load(records, json.loads(done.stdout))
        result.cpu = cpu
        if all_200 and result.statuses != {200: count}:
            found = dict(result.statuses)
            raise SystemExit(
                f"{server.kind}: not all {count} were answered with 200: {found} (0: lost)"
            )
        return result

    @contextlib.contextmanager
    def server(self, kind, **how):
        """Run a server, and check at its end that it has kept what it answered."""
        server = Server(self, kind, **how)
        try:
            yield server
        finally:
            server.stop()
        server.check_lines()
        shutil.rmtree(server.folder)

    def note(self, figure, kind, value):
        """Take a sample."""
        self.samples[figure, kind].append(value)

    def note_load(self, figure, kind, load, latency=False):
        """Take the samples of an ordinary run."""
        count = sum(load.statuses.values())
        self.note(f"{figure} cpu", kind, load.cpu * 10_000 / count)
        self.note(f"{figure} rate", kind, count / load.seconds)
        self.note(f"{figure} generator", kind, load.generator_cpu * 10_000 / count)
        if latency:
            self.note(f"{figure} p50", kind, load.latency_ms(0.50))
            self.note(f"{figure} p99", kind, load.latency_ms(0.99))


def make_environment(folder):
    """Make the virtual environment of the peers, unless it is there; return its Python."""
    wanted = (HERE / "requirements.txt").read_bytes() + sys.version.encode()
    mark, python = folder / "made-for", folder / "bin" / "python"
    if not mark.exists() or mark.read_bytes() != wanted:
        say(f"making {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*install, "-r", HERE / "requirements.txt"]).returncode:
            raise SystemExit(
                "the peers cannot be installed: is PyPI in reach, and this Python 3.11 or newer?"
            )
        mark.write_bytes(wanted)
    return str(python)


# ---- Measurements: each is one round of one figure -----------------------------------


def measure_start(bench, kinds):
    """Time from the start of the process to its first 200, and memory then."""
    for kind in kinds(bench.kinds):
        with bench.server(kind) as server:
            bench.note("start", kind, 1000 * server.start_seconds)
            time.sleep(0.3)
            bench.note("idle", kind, memory_of(server.pid, "VmRSS"))


def plain_load(bench, kinds, figure, name, mode, latency=False, close=False):
    """Deliveries over 8 connections."""
    file = bench.requests(name, close=close)
    for kind in kinds(bench.kinds):
        with bench.server(kind) as server:
            bench.load(server, file, mode=mode, count=WARM_UP)
            bench.note_load(
                figure, kind, bench.load(server, file, mode=mode, first=WARM_UP), latency
            )


def measure_keep(bench, kinds):
    """Connections kept alive."""
    plain_load(bench, kinds, "keep", "open", "keep", latency=True)


def measure_one(bench, kinds):
    """One connection, kept alive."""
    file = bench.requests("open")
    for kind in kinds(bench.kinds):
        with bench.server(kind) as server:
            bench.load(server, file, connections=1, count=WARM_UP)
            bench.note_load("one", kind, bench.load(server, file, connections=1, first=WARM_UP))


def measure_many(bench, kinds):
    """64 connections, kept alive."""
    file = bench.requests("open")
    for kind in kinds(bench.rivals):
        with bench.server(kind) as server:
            bench.load(server, file, connections=64, count=WARM_UP)
            bench.note_load("many", kind, bench.load(server, file, connections=64, first=WARM_UP))


def measure_paced(bench, kinds):
    """200 deliveries a second over one connection, for some seconds."""
    count = 200 if bench.options.quick else 1_000
    requests = read_requests(bench.requests("open"), count)
    for kind in kinds(bench.rivals):
        with bench.server(kind) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                before = cpu_seconds(server.pid)
                start = time.monotonic()
                for number, request in enumerate(requests):
                    time.sleep(max(0.0, start + number / 200 - time.monotonic()))
                    connection.sendall(request)
                    answer = b""
                    while not answer.endswith(b"}"):  # all of them answer with a JSON object
                        answer += connection.recv(65536) or b"}"
                    if not answer.startswith(b"HTTP/1.1 200"):
                        raise SystemExit(f"{kind}: not 200: {answer[:100]!r}")
                cpu = cpu_seconds(server.pid) - before
            server.answered += range(1, count + 1)
            bench.note("paced cpu", kind, cpu * 10_000 / count)


def measure_idle(bench, kinds):
    """8 connections, while 240 others are open and idle."""
    file = bench.requests("open")
    for kind in kinds(bench.rivals):
        with bench.server(kind) as server, contextlib.ExitStack() as stack:
            for _ in range(240):
                address = ("127.0.0.1", server.port)
                stack.enter_context(contextlib.closing(socket.create_connection(address)))
            bench.load(server, file, count=WARM_UP)
            load = bench.load(server, file, first=WARM_UP)
            bench.note_load("beside idle", kind, load, latency=True)


def measure_new(bench, kinds):
    """A new connection for each delivery, which the sender closes."""
    plain_load(bench, kinds, "new", "open", "new", latency=True)


def measure_close(bench, kinds):
    """A new connection for each delivery, with "Connection: close"."""
    plain_load(bench, kinds, "close", "close", "new", close=True)


def measure_nginx(bench, kinds):
    """Behind nginx, with our configuration and with a plain proxy_pass; kept alive towards
    nginx.
    """
    file = bench.requests("open")
    for form in Proxy.forms():
        for kind in kinds(bench.rivals):
            with (
                bench.server(kind) as server,
                Proxy(form, free_port(), server.port, server.folder) as proxy,
            ):
                bench.load(server, file, count=WARM_UP, port=proxy.port)
                before = sum(map(cpu_seconds, proxy.pids()))
                load = bench.load(server, file, first=WARM_UP, port=proxy.port)
                bench.note_load(f"nginx {form}", kind, load)
                cost = sum(map(cpu_seconds, proxy.pids())) - before
                bench.note(f"nginx {form} proxy", kind, cost * 10_000 / bench.options.deliveries)


def measure_synced(bench, kinds):
    """64 connections, our program with its log on disk before each answer, FastAPI without."""
    file = bench.requests("open")
    for kind in kinds(bench.rivals):
        with bench.server(kind, log_file=kind in bench.programs) as server:
            bench.load(server, file, connections=64, count=WARM_UP)
            bench.note_load("synced", kind, bench.load(server, file, connections=64, first=WARM_UP))


def measure_burst(bench, kinds):
    """1,000 connections that begin at once, and 1,000 that stand before the first of them sends."""
    file = bench.requests("burst", count=BURST)
    variants = [*bench.kinds, *(f"{kind} default" for kind in bench.programs)]
    for variant in kinds(variants):
        kind, _, default = variant.partition(" ")
        for mode in ("new", "hold"):
            with bench.server(kind, max_connections=None if default else 2 * BURST) as server:
                load = bench.load(
                    server, file, mode=mode, connections=BURST, count=BURST, all_200=False
                )
                bench.note(f"{mode} burst answered", variant, load.within_a_second)
                bench.note(f"{mode} burst 200", variant, load.statuses[200])
                bench.note(f"{mode} burst lost", variant, load.statuses[0])
                bench.note(f"{mode} burst 503", variant, load.statuses[503])
                bench.note(f"{mode} burst peak", variant, memory_of(server.pid, "VmHWM"))


def measure_flat(bench, kinds):
    """Memory after each of several bursts of 1,000 connections; once, in the first round."""
    bursts = 3 if bench.options.quick else 12
    if bench.samples["flat", "ours"]:
        return
    file = bench.requests(f"{bursts} bursts", count=BURST * bursts)
    for kind in kinds([*bench.programs, "fastapi"]):
        with bench.server(kind, max_connections=2 * BURST) as server:
            sizes = []
            for burst in range(bursts):
                how = {"mode": "hold", "connections": BURST, "count": BURST, "all_200": False}
                bench.load(server, file, first=BURST * burst, **how)
                time.sleep(0.5)
                sizes.append(memory_of(server.pid, "VmRSS"))
            bench.note("flat", kind, sizes)


def measure_remembered(bench, kinds):
    """Our program alone: deliveries a second with an empty memory, and with a full one."""
    count = bench.options.deliveries
    many = max(5_000 if bench.options.quick else 100_000, count + 1)
    file = bench.requests("many", count=WARM_UP + many + count, body_bytes=0)
    for kind in kinds(list(bench.programs)):
        with bench.server(kind) as server:
            bench.load(server, file, count=WARM_UP)
            bench.note_load("remembered 0", kind, bench.load(server, file, first=WARM_UP))
            bench.load(server, file, first=WARM_UP + count, count=many - count)
            bench.note_load("remembered many", kind, bench.load(server, file, first=WARM_UP + many))


def measure_webhooks(bench, kinds):
    """Our program alone: with one webhook, and with ten on paths of their own."""
    paths = [PATH, *(f"{PATH}/{number}" for number in range(1, 10))]
    webhooks = [
        {"name": f"noc{number}", "path": path, "token": TOKEN} for number, path in enumerate(paths)
    ]
    for kind in kinds(list(bench.programs)):
        for number, file in (
            (1, bench.requests("open")),
            (10, bench.requests("ten paths", paths=paths)),
        ):
            with bench.server(kind, webhooks=webhooks[:number]) as server:
                bench.load(server, file, count=WARM_UP)
                bench.note_load(f"webhooks {number}", kind, bench.load(server, file, first=WARM_UP))


def measure_tokens(bench, kinds):
    """Our program alone: with one token, and with five of which the last one matches."""
    file, others = bench.requests("open"), [f"another-token-{number}" for number in range(4)]
    for kind in kinds(list(bench.programs)):
        for tokens in ([TOKEN], [*others, TOKEN]):
            with bench.server(
                kind, webhooks={"name": "noc", "path": PATH, "token": tokens}
            ) as server:
                bench.load(server, file, count=WARM_UP)
                bench.note_load(
                    f"tokens {len(tokens)}", kind, bench.load(server, file, first=WARM_UP)
                )


MEASUREMENTS = {
    name.partition("_")[2]: function
    for name, function in list(globals().items())
    if name.startswith("measure_")
}

# ---- The table --------------------------------------------------------------------------


class Row:
    """One line of the table: a figure of all servers, and what ours aims at.

    `target` is a ratio to FastAPI's figure, `old_target` one to the other version's.
    """

    def __init__(self, title, figure, target=None, old_target=None, at_least=False, digits=2):
        self.title = title
        self.figure = figure
        self.target = target
        self.old_target = old_target
        self.at_least = at_least
        self.digits = digits


def rate_row(title, figure):
    """Return a row of deliveries per second."""
    return Row(f"deliveries/s: {title}", f"{figure} rate", 1.0, at_least=True, digits=0)


ROWS = [
    Row("CPU s per 10,000: 1 connection kept alive", "one cpu", 1.0, 1.0),
    Row("CPU s per 10,000: paced, 200 a second", "paced cpu", 1.0, 1.0),
    Row("CPU s per 10,000: 8 connections kept alive", "keep cpu", 1.0, 1.25),
    Row("CPU s per 10,000: 8 connections, 240 others idle", "beside idle cpu", 1.0),
    Row("CPU s per 10,000: 64 connections kept alive", "many cpu", 1.0, 1.4),
    Row("CPU s per 10,000: new connection each", "new cpu", 1.0, 1.25),
    Row('CPU s per 10,000: new connection each, "Connection: close"', "close cpu", 1.0, 1.25),
    rate_row("1 connection kept alive", "one"),
    rate_row("8 connections kept alive", "keep"),
    rate_row("8 connections, 240 others idle", "beside idle"),
    rate_row("64 connections kept alive", "many"),
    rate_row("new connection each", "new"),
    rate_row('new connection each, "Connection: close"', "close"),
    Row("latency p50 ms, 8 connections", "keep p50"),
    Row("latency p99 ms, 8 connections", "keep p99", 1.5),
    Row("latency p99 ms, 8 connections, 240 others idle", "beside idle p99", 1.5),
    Row("latency p99 ms, a new connection each", "new p99", 1.5),
    Row("behind our nginx: CPU s per 10,000", "nginx ours cpu", 1.0),
    rate_row("behind our nginx", "nginx ours"),
    Row("behind our nginx: CPU s of nginx itself", "nginx ours proxy"),
    Row("behind a plain proxy_pass: CPU s per 10,000", "nginx plain cpu", 1.0),
    rate_row("behind a plain proxy_pass", "nginx plain"),
    Row("behind a plain proxy_pass: CPU s of nginx itself", "nginx plain proxy"),
    Row("log_file synced (FastAPI: not), 64 connections: CPU s per 10,000", "synced cpu", 1.0),
    rate_row("log_file synced (FastAPI: not), 64 connections", "synced"),
    Row(
        "1,000 connections at once: answered within 1 s",
        "new burst answered",
        1.0,
        at_least=True,
        digits=0,
    ),
    Row("1,000 connections at once: lost", "new burst lost", digits=0),
    Row(
        "1,000 standing connections: answered within 1 s",
        "hold burst answered",
        1.0,
        at_least=True,
        digits=0,
    ),
    Row("1,000 standing connections: lost", "hold burst lost", digits=0),
    Row("memory MiB, idle", "idle", 0.7, digits=1),
    Row("memory MiB, peak of 1,000 connections at once", "new burst peak", digits=1),
    Row("memory MiB, peak of 1,000 standing connections", "hold burst peak", digits=1),
    Row("start to first 200, ms", "start", 0.4, digits=0),
    Row("load generator itself: CPU s per 10,000, kept alive", "keep generator"),
    Row("load generator itself: CPU s per 10,000, new connection", "new generator"),
]


def median_ratio(above, below):
    """Return the median of the ratios within the rounds, None without any."""
    ratios = [a / b for a, b in zip(above, below) if b]
    return statistics.median(ratios) if ratios else None


def verdict(row, target, ratio):
    """Say whether a target is met."""
    if target is None or ratio is None:
        return ""
    met = ratio >= target if row.at_least else ratio <= target
    return f"{'≥' if row.at_least else '≤'} {target:g}: {'met' if met else '**missed**'}"


def table_of(bench):
    """Return the lines of the Markdown table."""
    names = {"ours": "ours", "old": "old", "fastapi": "FastAPI", "naive": "naive", "floor": "floor"}
    old = ["ours/old", "target"] if "old" in bench.programs else []
    head = ["figure", "ours/FastAPI", "target", *old, *(names[kind] for kind in bench.kinds)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in ROWS:
        samples = {kind: bench.samples[row.figure, kind] for kind in bench.kinds}
        if not samples["ours"]:
            continue
        ratio = median_ratio(samples["ours"], samples["fastapi"])
        cells = [row.title, "" if ratio is None else f"{ratio:.2f}"]
        cells.append(verdict(row, row.target, ratio))
        if old:
            against = median_ratio(samples["ours"], samples["old"])
            cells.append("" if against is None else f"{against:.2f}")
            cells.append(verdict(row, row.old_target, against))
        values = [statistics.median(values) if values else None for values in samples.values()]
        lines.append(
            cells + ["" if value is None else f"{value:,.{row.digits}f}" for value in values]
        )
    return ["| " + " | ".join(line) + " |" for line in lines] if lines[2:] else []


OUTCOMES = ("200", "503", "lost", "peak")


def notes_of(bench):
    """Return what does not fit into the table: our program compared with itself."""
    lines = []
    pairs = [
        ("remembered, full memory against an empty one", "remembered 0", "remembered many"),
        ("webhooks, 10 against 1", "webhooks 1", "webhooks 10"),
        ("tokens, 5 (the last matches) against 1", "tokens 1", "tokens 5"),
    ]
    for kind in bench.programs:
        for title, one, many in pairs:
            few, more = bench.samples[f"{one} rate", kind], bench.samples[f"{many} rate", kind]
            few_cpu, more_cpu = (
                bench.samples[f"{one} cpu", kind],
                bench.samples[f"{many} cpu", kind],
            )
            if few:
                lines.append(
                    f"- {kind}: {title}: deliveries/s x {median_ratio(more, few):.2f} "
                    f"({statistics.median(few):,.0f} to {statistics.median(more):,.0f}), "
                    f"CPU s per 10,000 x {median_ratio(more_cpu, few_cpu):.2f} "
                    f"({statistics.median(few_cpu):.2f} to {statistics.median(more_cpu):.2f})"
                )
        for mode, title in (("new", "at once"), ("hold", "standing")):
            samples = [
                bench.samples[f"{mode} burst {what}", f"{kind} default"] for what in OUTCOMES
            ]
            if samples[0]:
                accepted, refused, lost, peak = map(statistics.median, samples)
                lines.append(
                    f"- {kind}: 1,000 connections {title} with the default max_connections: "
                    f"{accepted:.0f} answered 200, {refused:.0f} answered 503, {lost:.0f} lost, "
                    f"peak {peak:.1f} MiB"
                )
    for kind in bench.kinds:
        sizes = [f"{statistics.median(after):.1f}" for after in zip(*bench.samples["flat", kind])]
        if sizes:
            lines.append(
                f"- {kind}: memory MiB after each burst of 1,000 standing: {', '.join(sizes)}"
            )
    return lines


def describe_machine(bench):
    """Say what it was measured on."""
    versions = [
        f"Python {platform.python_version()}",
        f"Linux {platform.release()}",
        f"{os.cpu_count()} CPUs",
    ]
    pins = dict(line.split("==") for line in (HERE / "requirements.txt").read_text().split())
    versions += [f"{name} {pins[name]}" for name in ("fastapi", "uvicorn", "httptools", "uvloop")]
    rounds = f"{bench.options.rounds} rounds of {bench.options.deliveries:,} deliveries"
    return f"{', '.join(versions)}; {rounds}; load average {os.getloadavg()[0]:.1f} at the end"


def parse_arguments(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python3 -m tests.benchmark", description=__doc__.partition("\n")[0]
    )
    add, figures = parser.add_argument, list(MEASUREMENTS)
    add("--rounds", type=int, default=5, metavar="N", help="medians are taken over them (5)")
    add("--deliveries", type=int, default=10_000, metavar="N", help="of each measurement (10000)")
    add("--only", nargs="+", choices=figures, metavar="FIGURE", help=", ".join(figures))
    add("--quick", action="store_true", help="one round of 1,500 deliveries: does it all work?")
    add("--old", metavar="FILE", help="another version of the program, to compare with")
    add("--venv", metavar="DIR", default="~/.cache/central-webhook-benchmark", help="of the peers")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.deliveries = 1, 1_500
    return options


def main(argv=None):
    """Run all rounds, print the table."""
    options = parse_arguments(argv)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(options, Path(folder))
        for number in range(options.rounds):

            def in_turn(kinds, number=number):
                """Begin with another server in each round."""
                turn = number % len(kinds)
                return kinds[turn:] + kinds[:turn]

            for name, measure in MEASUREMENTS.items():
                if not options.only or name in options.only:
                    say(f"round {number + 1} of {options.rounds}: {name}")
                    measure(bench, in_turn)
        print(describe_machine(bench), "", *table_of(bench), "", *notes_of(bench), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
