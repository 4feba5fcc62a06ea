"""The recipes of README.md with the real tools; only paths and ports of its text are replaced."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import unittest
import urllib.parse
from pathlib import Path

from central_webhook_client import Summary, summarize

from ..support import PATH, PROGRAM, TOKEN, Receiver, deadline_poll, new_body
from ..test_readme import block, section
from . import parts
from .recipes import FORWARD, RECIPES, RecipeTest, recipe

CONTAINER = section("As a service")
LOG = "/var/lib/centralwebhook/central.jsonl"
LONG = 20_000  # characters: more than the 8 KiB at which rsyslog cuts by default

ALERTS = (  # of each sender, and what none should send
    {
        "alert_type": "AP disconnected",
        "severity": "Major",
        "state": "Open",
        "description": "AP ap-17 disconnected",
        "device_id": "CNDZ1",
        "setting_id": "cid-4",
    },
    {
        "id": "e1",
        "alertId": "a-1",
        "name": "AP Down",
        "severity": "Critical",
        "state": "Cleared",
        "summary": "AP down",
        "notes": None,
        "impactedEntities": {"deviceSerial": ["CG0019588"], "clientMac": []},
        "additionalDetails": [{"hostname": "h"}],
    },
    {
        "topic": "alarms",
        "events": [
            {"type": "device_down", "severity": "critical", "mac": "aa", "timestamp": 1},
            {"type": "device_up"},
        ],
    },
    {"type": "snapshot", "action": "discover", "status": "failed", "reason": "no disk"},
    {"event": "session.completed"},
    {"username": "Test-User"},
    {"alert_type": "SSID \ud83d", "details": None},
    {"details": [1], "severity": {"a": 1}, "state": []},
    [],
    None,
    "text",
    5,
)


def record_of(alert, number=0, **more):
    """Return a line of the log, as the receiver writes it."""
    record = {"received_at": f"2026-11-21T20:35:12.{number:03}Z", "webhook": "noc"}
    record.update(type="central", delivery_id=None, sent_at=None, alert=alert)
    return {**record, "key": f"key{number}", **more}


class OwnCodeTest(RecipeTest):
    def setUp(self):
        super().setUp()
        shutil.copy(PROGRAM, self.folder)
        code = block("python", "import sys\nimport central_webhook_client", RECIPES)
        (self.folder / "my_receiver.py").write_text(code)
        self.config = {
            "webclient_info": {"host": "127.0.0.1", "port": 0},
            "central_info": {"webhook": {"name": "noc", "path": PATH, "token": TOKEN}},
        }

    def test_the_unit_test_passes_as_printed(self):
        code = block("python", "import unittest", RECIPES)
        self.assertLessEqual(len(code.splitlines()), 7)
        (self.folder / "test_my_receiver.py").write_text(code)
        self.assertIn("Ran 1 test", self.run_shell(f"'{sys.executable}' -m unittest"))

    def test_a_program_of_ones_own_takes_the_place_of_the_receiver(self):
        program = self.folder / "my_receiver.py"
        with Receiver(self.config, program=program) as receiver:
            for alert in ALERTS:
                self.assertEqual(200, receiver.deliver(json.dumps(alert).encode()).status)
            receiver.wait_for_log("noc Open AP disconnected CNDZ1")

    def test_one_changed_line_posts_to_the_chat(self):
        self.assertIn("set `handle_alert = post_to_slack`", RECIPES)
        path = self.folder / PROGRAM.name
        source = path.read_text(encoding="utf-8")
        line = "handle_alert: Optional[Callable[[Delivery], None]] = None"
        self.assertEqual(1, source.count(line))
        path.write_text(source.replace(line, "handle_alert = post_to_slack"), encoding="utf-8")
        chat = self.endpoint()
        with Receiver(self.config, program=path, environment={"CHAT_URL": chat.url}) as receiver:
            for alert in ALERTS:
                body = json.dumps(alert).encode()
                self.assertEqual(200, receiver.deliver(body).status)
            self.assertEqual(200, receiver.deliver(new_body(name="<!channel> & 2")).status)
            deadline_poll(lambda: len(chat.requests) == len(ALERTS) + 1, 10)
        texts = [payload["text"] for payload in chat.payloads]
        self.assertNotIn("<", "".join(texts))
        for word in ("OPEN", "AP disconnected", "CNDZ1"):
            self.assertIn(word, texts[0])


class WatchTest(RecipeTest):
    def test_jq_shows_critical_alerts_and_goes_on_after_what_it_cannot_read(self):
        for program in ("jq", "tail"):
            parts.need_program(program)
        self.log.touch()
        self.spawn(block("sh", "tail -n 0 -F", RECIPES), "seen")

        def starts():
            self.append(record_of({"severity": "Critical", "name": "first"}))
            time.sleep(0.05)
            return "first" in self.read("seen")

        deadline_poll(starts, 20)
        self.append(
            record_of({"severity": "Critical", "alert_type": "half an emoji \ud83d"}),
            f'{{"alert": {"[" * 300}{"]" * 300}}}\n',
            f'{{"alert": {"[" * 20000}{"]" * 20000}}}\n',
            '{"received_at": "20\n',
            "a\0b\n\n",
            *(json.dumps(alert) + "\n" for alert in ([], None, 5, "text", {}, {"alert": "x"})),
            *(record_of(alert) for alert in ALERTS if "AP Down" not in str(alert)),
            record_of({"severity": "Critical", "alert_type": "esc \x1b \x9b \u202e", "summary": 1}),
        )
        with (self.folder / "central.jsonl").open("ab") as log:
            log.write(b"\xff\xfe\n")
        self.append(record_of({"severity": "Critical", "alert_type": "last"}))
        deadline_poll(lambda: '"last"' in self.read("seen"), 20, self.read("seen")[-500:])
        seen = [line for line in self.read("seen").splitlines() if "first" not in line]
        alerts = [json.loads(line) for line in seen if "DEBUG" not in line]
        self.assertEqual(["esc \x1b \x9b \u202e", "last"], [name for _, name, _ in alerts][-2:])
        self.assertLessEqual(len(alerts), 3)  # newer versions of jq read half an emoji
        self.assertTrue(all(line.isascii() and line.isprintable() for line in seen))
        self.assertGreaterEqual(sum("skipped line" in line for line in seen), 4)
        self.assertLess(max(map(len, seen)), 200)


class SummarizeTest(RecipeTest):
    def test_alerts_of_every_sender_are_summarized(self):
        self.assertIn(
            ", ".join(f"`{field}`" for field in Summary._fields), " ".join(RECIPES.split())
        )
        expected = [  # severity, state, name, device, site, description
            ("Major", "Open", "AP disconnected", "CNDZ1", "", "AP ap-17 disconnected"),
            ("Critical", "Cleared", "AP Down", "CG0019588", "", "AP down"),
            ("critical", "", "alarms device_down (2 events)", "aa", "", ""),
            ("", "failed", "snapshot", "", "", "no disk"),
            ("", "", "session.completed", "", "", ""),
            ("", "", "", "", "", ""),
            ("", "", "SSID \ud83d", "", "", ""),
            *[("", "", "", "", "", "")] * 5,
        ]
        self.assertEqual(expected, [tuple(summarize(alert)) for alert in ALERTS])


class ChatTest(RecipeTest):
    def messages(self, text, records):
        """Return what the chat gets for these records."""
        failed = []

        def answer(request):
            if not failed:  # once, so that the first one is sent again
                failed.append(request)
                return 503
            return 200

        chat = self.endpoint(answer)
        self.append(*records)
        self.forward("--all", text=text, name="chat.py", FORWARD_URL=chat.url)
        deadline_poll(lambda: len(chat.requests) > len(records), 20, self.read("output"))
        self.assertEqual(chat.payloads[0], chat.payloads[1])
        return chat.payloads[1:]

    def test_slack_gets_each_alert_with_its_state(self):
        alerts = list(ALERTS)
        alerts[0] = {**alerts[0], "description": "<!channel> on <1/1/3> & @all"}
        alerts.append({**alerts[0], "state": "Close"})
        records = [record_of(alert, number) for number, alert in enumerate(alerts)]
        texts = [message["text"] for message in self.messages(recipe("import html"), records)]
        text = "noc | OPEN | Major | AP disconnected | CNDZ1 | "
        text += "&lt;!channel&gt; on &lt;1/1/3&gt; &amp; @\u200ball"
        self.assertEqual(text, texts[0])
        self.assertEqual(text.replace("OPEN", "CLOSE"), texts[-1])
        self.assertEqual("noc | CLEARED | Critical | AP Down | CG0019588 | AP down", texts[1])
        self.assertEqual("noc", texts[ALERTS.index([])])

    def test_teams_gets_an_adaptive_card(self):
        self.assertIn("# for a workflow of Teams: post(card(text))", RECIPES)
        text, number = re.subn(r"(?m)^    post\(.*$", "    post(card(text))", recipe("import html"))
        self.assertEqual(1, number)
        (message,) = self.messages(text, [record_of(ALERTS[0])])
        (attachment,) = message["attachments"]
        self.assertEqual("message", message["type"])
        self.assertEqual("application/vnd.microsoft.card.adaptive", attachment["contentType"])
        self.assertEqual("AdaptiveCard", attachment["content"]["type"])
        ((run,),) = [part["inlines"] for part in attachment["content"]["body"]]
        self.assertTrue(run["text"].startswith("noc | OPEN | Major | AP disconnected"))


class ServiceNow:
    """A stand-in for ServiceNow's Table API, with one table of incidents."""

    def __init__(self, test):
        self.test, self.incidents, self.calls = test, {}, []
        self.fail_next = []

    def __call__(self, request):
        test, (path, _, query) = self.test, request.path.partition("?")
        login = base64.b64encode(b"user:pass:word").decode()
        if request.headers["Authorization"] != f"Basic {login}":
            return 401, {}, {"error": {"message": "User Not Authenticated"}}
        test.assertEqual("application/json", request.headers["Accept"])
        self.calls.append(request.command)
        if request.command == "GET":
            test.assertEqual("/api/now/table/incident", path)
            fields = dict(urllib.parse.parse_qsl(query, strict_parsing=True))
            test.assertEqual("sys_id", fields["sysparm_fields"])
            number, states = fields["sysparm_query"].split("^")
            test.assertEqual("stateNOT IN6,7,8", states)
            test.assertRegex(number, r"\Acorrelation_id=[\w.:-]{1,100}\Z")
            number = number.partition("=")[2]
            found = [
                {"sys_id": sys_id}
                for sys_id, incident in self.incidents.items()
                if incident["correlation_id"] == number and incident["state"] not in ("6", "7", "8")
            ]
            return 200, {}, {"result": found}
        test.assertEqual("application/json", request.headers["Content-Type"])
        if request.command == "POST":
            test.assertEqual("/api/now/table/incident", path)
            fields = {"correlation_id", "short_description", "description", "urgency"}
            test.assertEqual(fields, set(request.payload))
            test.assertIn(request.payload["urgency"], ("1", "2", "3"))
            test.assertLessEqual(len(request.payload["short_description"]), 160)
            sys_id = f"{len(self.incidents):032x}"
            self.incidents[sys_id] = {"state": "1", **request.payload}
            if self.fail_next:
                return self.fail_next.pop()  # created, but the answer is lost
            return 201, {}, {"result": {"sys_id": sys_id}}
        test.assertEqual("PATCH", request.command)
        test.assertRegex(path, r"\A/api/now/table/incident/[0-9a-f]{32}\Z")
        test.assertEqual({"state", "close_code", "close_notes"}, set(request.payload))
        self.incidents[path.rpartition("/")[2]].update(request.payload)
        return 200, {}, {"result": {}}


class TicketTest(RecipeTest):
    def test_an_alert_opens_one_incident_and_its_end_resolves_it(self):
        self.assertIn("never against ServiceNow", RECIPES)
        new, classic = ALERTS[1], ALERTS[0]
        active = {**new, "state": "Active", "summary": "x" * 500}
        records = [
            active,
            {**active, "operation": "Update"},
            new,
            active,  # again, after the first incident was resolved
            classic,
            {**classic, "device_id": "other^ORactive=true"},
            {**classic, "state": "Close"},
            {**classic, "state": "Closed", "setting_id": "never opened"},
            [],
            {"events": [{"type": "device_down"}]},
        ]
        service_now = ServiceNow(self)
        service_now.fail_next.append(500)
        desk = self.endpoint(service_now)
        self.append(*(record_of(alert, number) for number, alert in enumerate(records)))
        environment = {"SERVICENOW_URL": desk.url, "SERVICENOW_LOGIN": "user:pass:word"}
        self.forward("--all", text=recipe("import base64"), name="tickets.py", **environment)
        deadline_poll(lambda: len(service_now.incidents) >= 6, 20, self.read("output"))
        incidents = list(service_now.incidents.values())
        self.assertEqual(
            [
                ("a-1", "6", "1"),
                ("a-1", "1", "1"),
                ("cid-4:CNDZ1", "6", "2"),
                ("cid-4:other_ORactive_true", "1", "2"),
                ("key8", "1", "3"),
                ("key9", "1", "3"),
            ],
            [(one["correlation_id"], one["state"], one["urgency"]) for one in incidents],
        )
        self.assertEqual("Critical AP Down CG0019588", incidents[0]["short_description"])
        self.assertIn("state: Cleared", incidents[0]["close_notes"])
        self.assertTrue(incidents[0]["close_code"])
        self.assertEqual(1, self.read("output").count("again in"), self.read("output"))
        self.assertNotIn("skipped", self.read("output"))

    def test_an_answer_that_is_not_json_means_again(self):
        answers = [200]  # an instance that sleeps answers with a page
        desk = self.endpoint(
            lambda request: answers.pop() if answers else (200, {}, {"result": [{}]})
        )
        self.append(record_of({}))
        environment = {"SERVICENOW_URL": desk.url, "SERVICENOW_LOGIN": "a:b"}
        self.forward("--all", text=recipe("import base64"), name="tickets.py", **environment)
        deadline_poll(lambda: len(desk.requests) == 2, 20, self.read("output"))
        self.assertIn("again in 1 s", self.read("output"))


class QueueTest(RecipeTest):
    def start_broker(self):
        """Start a RabbitMQ on loopback, with all its files in the folder; return its URL."""
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
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=(
                "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1"
            ),
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

    def test_a_consumer_handles_each_alert_once(self):
        parts.need_module("pika")
        environment, receiver = {"AMQP_URL": self.start_broker()}, self.receiver()
        text = recipe("import pika\n\nchannel = None")
        (self.folder / "consumer.py").write_text(block("python", "import json, os, pika", RECIPES))
        consume = [sys.executable, "consumer.py"]
        self.assertEqual(200, receiver.deliver(new_body(text="x" * 100_000)).status)
        impatient = {"AMQP_URL": f"{environment['AMQP_URL']}/%2F?heartbeat=1"}
        publisher = self.forward("--all", text=text, python=None, **impatient)
        consumer = self.spawn(consume, "consumed", environment)
        for _ in range(20):
            self.assertEqual(200, receiver.deliver().status)
        self.wait_for_keys()
        deadline_poll(lambda: "missed heartbeats" in self.read("broker.log"), 30)
        self.assertEqual(200, receiver.deliver().status)  # the broker has closed the connection
        self.wait_for_keys()
        self.assertIn("again in 1 s", self.read("output"))
        last = self.consumed()[-1].split(".")[0]
        with contextlib.closing(sqlite3.connect(self.folder / "seen.db")) as seen:
            query = "SELECT 1 FROM seen WHERE key = ?"  # a kill before that may repeat the last one
            deadline_poll(lambda: seen.execute(query, (last,)).fetchone())
        self.end(publisher, signal.SIGKILL)
        self.end(consumer, signal.SIGKILL)
        self.assertEqual(200, receiver.deliver().status)  # while nothing publishes
        (self.folder / "central.forward.py.position").unlink()  # so all are published again
        self.forward("--all", text=text, python=None, **environment)
        self.spawn(consume, "consumed", environment)
        self.wait_for_keys()
        self.append(
            record_of(None, key=None), record_of(None, key=None), record_of(None, key="end")
        )
        deadline_poll(lambda: self.consumed()[-1:] == ["end"], 20)
        self.assertEqual(["None", "None"], self.consumed()[-3:-1])

    def consumed(self):
        return [line.split()[1] for line in self.read("consumed").splitlines()]

    def wait_for_keys(self):
        """Wait until what was consumed is exactly what is in the log."""
        keys = [json.loads(line)["key"] for line in self.log_lines()]
        deadline_poll(lambda: len(self.consumed()) >= len(keys), 20, self.read("output"))
        self.assertEqual(keys, self.consumed())


class RsyslogTest(RecipeTest):
    def test_the_second_host_gets_the_same_lines_across_a_rotation(self):
        rsyslogd = parts.need_program("rsyslogd")
        (port,) = parts.free_ports(1)
        first, second = (
            block("conf", f'global(maxMessageSize="8m")\nmodule(load="{name}")', RECIPES)
            for name in ("imfile", "imtcp")
        )
        for old, new in (
            (LOG, str(self.log)),
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
            self.log.rename(self.folder / f"central.jsonl.{number}")  # the receiver notices

    def wait_for_copy(self, lines):
        deadline_poll(lambda: self.read("copy.jsonl").splitlines() == lines, 30, "the copy differs")

    @staticmethod
    def answers(port):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True


class LogrotateTest(RecipeTest):
    def test_logrotate_moves_the_log_and_forward_gets_all(self):
        logrotate = parts.need_program("logrotate")
        receiver, to = self.receiver(), self.endpoint()
        text = block("logrotate", LOG, RECIPES).replace(LOG, str(self.log))
        conf = self.folder / "logrotate.conf"
        conf.write_text(text)
        conf.chmod(0o644)
        os.chmod(self.folder, 0o755)
        bodies = [new_body() for _ in range(5)]
        for number, body in enumerate(bodies):
            self.assertEqual(200, receiver.deliver(body).status)  # it notices the rotation
            if number == 0:
                self.forward("--all", FORWARD_URL=to.url)
            if number in (0, 2, 4):  # in between, it lags
                deadline_poll(lambda count=number + 1: len(to.requests) >= count, 20)
            self.run_shell(f"'{logrotate}' --force --state state logrotate.conf")
        self.assertFalse(self.log.exists())
        self.assertTrue((self.folder / "central.jsonl.5.gz").exists())
        self.assertEqual(
            [json.loads(body) for body in bodies], [one["alert"] for one in to.payloads]
        )


class UnitTest(RecipeTest):
    def test_systemd_accepts_the_unit(self):
        analyze = parts.need_program("systemd-analyze")
        unit = block("ini", "[Service]\nExecStart=/usr/bin/python3 /opt/centralwebhook/fo", RECIPES)
        script = "/opt/centralwebhook/forward.py"
        self.assertIn(script, unit)
        (self.folder / "forward.py").write_text(FORWARD)
        unit = unit.replace(script, str(self.folder / "forward.py"))
        (self.folder / "centralwebhook-forward.service").write_text(unit)
        done = subprocess.run(
            [analyze, "verify", "--man=no", "./centralwebhook-forward.service"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=30,
        )
        self.assertNotIn("centralwebhook-forward", done.stderr)


class ContainerTest(RecipeTest):
    def test_the_compose_file_says_what_the_text_says(self):
        parts.need_module("yaml")
        import yaml

        services = yaml.safe_load(block("yaml", "services:", CONTAINER))
        receiver, nginx = (services["services"][name] for name in ("receiver", "nginx"))
        (proxies,) = re.findall(r'`("trusted_proxies": .+?)`', CONTAINER)
        self.assertNotIn("networks", services)  # so their addresses are of Docker's own pools
        self.assertEqual(
            ["172.16.0.0/12", "192.168.0.0/16"], json.loads(f"{{{proxies}}}")["trusted_proxies"]
        )
        self.assertTrue(receiver["read_only"])
        self.assertRegex(receiver["user"], r"\A[1-9]\d*:\d+\Z")
        self.assertNotIn("ports", receiver)
        self.assertEqual(["443:443"], nginx["ports"])
        run = block("sh", "sudo install -d", CONTAINER)
        self.assertIn(f" {receiver['image']} {receiver['command']}\n", run)
        for volume in receiver["volumes"]:
            self.assertIn(f'-v "$PWD/{volume[2:]}"', run)
        kind, program, option, code = receiver["healthcheck"]["test"]
        self.assertEqual(("CMD", "python3", "-c"), (kind, program, option))
        with self.receiver_of_a_container() as running:
            code = code.replace("8010", str(running.port))
            self.run_shell(f"'{sys.executable}' -c \"{code}\"")
        with self.assertRaises(AssertionError):
            self.run_shell(f"'{sys.executable}' -c \"{code}\" 2>&1")

    @staticmethod
    def receiver_of_a_container():
        return Receiver()


if __name__ == "__main__":
    unittest.main()
