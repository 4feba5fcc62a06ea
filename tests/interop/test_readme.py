"""The commands of README.md that need git, curl or nginx. Only paths and ports are replaced."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from ..support import PATH, PROGRAM, TOKEN, TOP, Receiver, config_of, deadline_poll
from ..test_readme import block, inline_commands, section, write_program
from . import parts
from .test_nginx import CONF, Nginx


class CommandTest(unittest.TestCase):
    """A folder of its own; programs in its folder bin take the place of those of the machine."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="readme-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.replace_program("sudo", "import os, sys\nos.execvp(sys.argv[1], sys.argv[1:])\n")
        (self.folder / "bin" / "python3").symlink_to(sys.executable)

    def replace_program(self, name, code):
        write_program(self.folder / "bin" / name, code)

    def run_shell(self, commands, folder=None, **environment):
        """Run lines for the shell to their end; return what they print."""
        search = f"{self.folder}/bin:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-e", "-c", commands],
            cwd=folder or self.folder,
            env={**os.environ, "PATH": search, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        return done.stdout

    def git(self, *arguments):
        """Run git in the folder "upstream"."""
        author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        command = ["git", "-C", str(self.folder / "upstream"), *author, *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=30)

    def make_repository(self):
        """Make a git repository "upstream" of the files that a reader needs; return its path."""
        parts.need_program("git")
        path = self.folder / "upstream"
        path.mkdir()
        for name in (PROGRAM.name, "input_info.json.example"):
            shutil.copy(TOP / name, path)
        shutil.copytree(TOP / "nginx", path / "nginx")
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=first")
        return path


class NginxTest(CommandTest):
    def test_a_sample_goes_through_nginx_as_installed(self):
        program = parts.need_program("nginx")
        parts.need_program("openssl")
        text = section("Behind nginx")
        parts.make_certificates(self.folder)
        webhook = {"name": "central", "path": PATH, "token": TOKEN}
        with Receiver(config_of(webhook=webhook)) as receiver:
            http_port, https_port, port = parts.free_ports(3)
            edited = CONF.read_text()
            for old, new in (  # as a reader edits it, and on ports of this test
                ("/etc/letsencrypt/live/webhook.example.com", str(self.folder)),
                ("webhook.example.com", "localhost"),
                ("listen 80;", f"listen 127.0.0.1:{http_port};"),
                ("listen 443 ssl;", f"listen 127.0.0.1:{https_port} ssl;"),
                ("listen [::]:80;", ""),
                ("listen [::]:443 ssl;", ""),
                ("server 127.0.0.1:8010", f"server 127.0.0.1:{receiver.port}"),
            ):
                self.assertIn(old, edited)
                edited = edited.replace(old, new)
            (self.folder / "nginx").mkdir()
            (self.folder / "nginx" / CONF.name).write_text(edited)
            shutil.copy(receiver.config_path, self.folder)
            shutil.copy(PROGRAM, self.folder)
            (self.folder / "conf.d").mkdir()
            (self.folder / "nginx.conf").write_text(
                f"daemon off; worker_processes 1; pid {self.folder}/pid;\n"
                f"{'user root;' if os.geteuid() == 0 else ''}\n"
                f"error_log {self.folder}/error.log notice; events {{ }}\n"
                f"http {{ access_log off; client_body_temp_path {self.folder}/body;\n"
                f"proxy_temp_path {self.folder}/proxy; fastcgi_temp_path {self.folder}/fastcgi;\n"
                f"uwsgi_temp_path {self.folder}/uwsgi; scgi_temp_path {self.folder}/scgi;\n"
                f"server {{ listen 127.0.0.1:{port}; }}\n"
                f"include {self.folder}/conf.d/*.conf; }}\n"
            )
            start = [program, "-e", f"{self.folder}/error.log", "-c", f"{self.folder}/nginx.conf"]
            nginx = subprocess.Popen(start, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.addCleanup(nginx.wait, 10)
            self.addCleanup(nginx.terminate)
            deadline_poll(lambda: Nginx.accepts(port))
            self.replace_program(
                "nginx", f"import os, sys\nos.execv({program!r}, {start!r} + sys.argv[1:])\n"
            )
            # It returns when nginx listens, so that this test does not depend on luck.
            self.replace_program(
                "systemctl",
                "import os, signal, socket, sys, time\n"
                "assert sys.argv[1:] == ['reload', 'nginx']\n"
                f"os.kill({nginx.pid}, signal.SIGHUP)\n"
                "for _ in range(1000):\n"
                "    try:\n"
                f"        sys.exit(socket.create_connection(('127.0.0.1', {https_port})).close())\n"
                "    except OSError:\n"
                "        time.sleep(0.01)\n"
                "sys.exit('nginx does not listen')\n",
            )
            commands = block("sh", "sudo cp", text)
            for old, new in (
                ("/etc/nginx", str(self.folder)),
                ("webhook.example.com", f"localhost:{https_port}"),
            ):
                self.assertIn(old, commands)
                commands = commands.replace(old, new)
            printed = self.run_shell(commands, SSL_CERT_FILE=str(self.folder / "authority.pem"))
        (shown,) = re.findall("It prints `(.+?)`", text)
        pattern = r'\A200 \{"status": "ok"\} \d+ ms\n?\Z'
        self.assertRegex(shown, pattern)
        self.assertRegex(printed, pattern)


class MonitoringTest(CommandTest):
    def test_curl_gets_the_health_and_the_metrics(self):
        parts.need_program("curl")
        text = section("Operate it")
        with Receiver() as receiver:
            health, metrics = (
                self.run_shell(command.replace(":8010/", f":{receiver.port}/"))
                for command in inline_commands(text)
                if command.startswith("curl")
            )
        self.assertIn(f"answers `{health}`", text.replace("\n", " "))
        self.assertIn("central_webhook_deliveries_total{", metrics)


class UpgradeTest(CommandTest):
    def test_a_new_version_is_tried_before_the_restart(self):
        repository = self.make_repository()
        self.replace_program("systemctl", "import sys\nprint('systemctl', *sys.argv[1:])\n")
        self.git("clone", "--quiet", ".", str(self.folder / "centralwebhook"))
        clone = self.folder / "centralwebhook"
        with (repository / PROGRAM.name).open("a") as program:
            program.write("# a new version\n")
        self.git("commit", "--quiet", "--all", "--message=second")
        for start in ("git pull", "python3 central_webhook_client.py --demo &&"):
            (command,) = [one for one in inline_commands() if one.startswith(start)]
            printed = self.run_shell(command, folder=clone)
        self.assertTrue((clone / PROGRAM.name).read_text().endswith("# a new version\n"))
        self.assertTrue(printed.endswith("systemctl restart centralwebhook.service\n"), printed)


if __name__ == "__main__":
    unittest.main()
