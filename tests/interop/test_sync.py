"""When the log is synced, and what happens if that fails or hangs: seen and caused by strace."""

from __future__ import annotations

import contextlib
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

from tests.interop.parts import need, need_program
from tests.support import (
    DUPLICATE,
    OK,
    LogTest,
    deadline_poll,
    parse_lines,
    signed,
)

CALLS = "write,fsync,fdatasync,sendto"
SYNC = r"f(?:data)?sync"


def setUpModule():
    need_program("strace")


class Sync(LogTest):
    @contextlib.contextmanager
    def traced(self, receiver, *options):
        """Trace the calls of a receiver; yields a function that returns the trace so far."""
        trace = self.folder / "trace"
        command = ["strace", "-f", "-y", "-s", "20", "-o", str(trace), "-e", f"trace={CALLS}"]
        process = subprocess.Popen(
            [*command, *options, "-p", str(receiver.process.pid)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            said = process.stderr.readline()
            need("the right to trace a process", lambda: b"attached" in said)
            yield trace.read_text
        finally:
            process.terminate()  # it detaches
            process.communicate(timeout=20)

    def test_a_200_is_sent_after_its_line_was_synced(self):
        with self.started() as receiver, self.traced(receiver) as trace:
            for _ in range(3):
                self.assertEqual(receiver.deliver().status, 200)
            deadline_poll(lambda: trace().count("HTTP/1.1 200") == 3)
            log = re.escape(str(self.log))
            calls = re.findall(rf"(write|{SYNC}|sendto)\(\d+<(?:{log}|TCP|socket)[^>]*>.*", trace())
        expected = ["write", "fdatasync", "sendto"] * 3
        self.assertEqual([call.replace("fsync", "fdatasync") for call in calls], expected)

    def test_while_syncing_fails_nothing_is_accepted_and_a_repetition_has_the_same_key(self):
        with self.started() as receiver:
            self.assertEqual(receiver.deliver().status, 200)
            before = self.log.read_bytes()
            sent = signed()
            failing = ["-e", "inject=fsync,fdatasync:error=EIO"]
            with self.traced(receiver, *failing):
                for _ in range(2):
                    self.assertEqual(receiver.post(*sent).status, 503)
                    self.assertEqual(receiver.health(), 503)
            receiver.reload(
                pattern="configuration reloaded"
            )  # remembers nothing of the failed ones
            self.assertEqual(receiver.post(*sent).json, OK)
            self.assertEqual(receiver.post(*sent).json, DUPLICATE)
            self.assertEqual(receiver.health(), 200)
            data = self.log.read_bytes()
        self.assertTrue(data.startswith(before), "the log has shrunk or changed")
        keys = [line["key"] for line in parse_lines(data)]
        self.assertEqual(len(set(keys)), 2)
        self.assertEqual(len(set(keys[1:])), 1)

    def test_while_syncing_hangs_deliveries_get_503_and_a_reload_is_refused(self):
        with self.started(request_timeout_seconds=0.3) as receiver:
            hanging = ["-e", "inject=fsync,fdatasync:delay_enter=3000000"]
            with self.traced(receiver, *hanging), ThreadPoolExecutor() as pool:
                first = pool.submit(receiver.deliver)
                deadline_poll(lambda: receiver.health() == 503)
                receiver.reload(pattern="ERROR configuration not reloaded.*the output is stuck")
                self.assertEqual(receiver.deliver().status, 503)
                self.assertEqual(first.result().status, 200)
            self.assertEqual(receiver.deliver().status, 200)
        self.assertEqual(len(self.read_log()), 2)

    def test_a_folder_that_cannot_be_synced_is_passed_over(self):
        """As on CIFS and FUSE: the file is synced with fdatasync, its folder with fsync."""
        with self.started() as receiver, self.traced(receiver, "-e", "inject=fsync:error=EINVAL"):
            self.assertEqual(receiver.deliver().status, 200)
            self.log.unlink()
            self.assertEqual(receiver.deliver().status, 200)  # opened again, in the same folder
        self.assertEqual(len(self.read_log()), 1)
