"""Make a minimal Debian or Ubuntu, type the README's one line there, and run `make demo` and `make test`.

    python3 -m tests.bare_machine trixie /var/tmp/trixie --demo --test

It needs root, git and debootstrap, and 10 GB in a folder that does not exist yet. The machine is a chroot with its own
mounts and processes, which end with this program. Inside, an ordinary user has a clone of the last commit, and no
variable of your environment but those that `--pass-variable` names.
"""

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USER = "user"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PASSED = ["PIP_*", "*_proxy", "*_PROXY", "SSL_CERT_*", "*_CA_BUNDLE"]
NETWORK_FILES = ["/etc/resolv.conf", "/etc/hosts"]
IN_NAMESPACES = "TUNESMITH_BARE_MACHINE"  # set in the process that has its own mounts and processes


def readme_line() -> str:
    """The README's line that installs what the system has to bring."""
    (line,) = re.findall(r"^\$ sudo (apt install .+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    return line


def apt_mirror(distribution: str) -> str:
    """The first mirror of the distribution that apt on this machine uses."""
    command = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages"]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        origin, _, uri = line.partition(" ")
        if origin == distribution:
            return uri
    sys.exit(f"error: apt on this machine has no mirror of {distribution}. Name one with --mirror.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="such as bookworm, trixie or noble")
    parser.add_argument("folder", type=Path, help="folder of the machine; it must not exist, and is removed at the end")
    parser.add_argument("--distribution", default="Debian", help="Debian or Ubuntu; default: Debian")
    parser.add_argument("--mirror", help="default: the mirror of the distribution that apt on this machine uses")
    parser.add_argument("--demo", action="store_true", help="run `make demo`")
    parser.add_argument("--test", action="store_true", help="run `make test`")
    parser.add_argument("--as-root", action="store_true", help="run both as root, not as an ordinary user")
    parser.add_argument("--keep", action="store_true", help="do not remove the folder at the end")
    parser.add_argument("--bind", action="append", default=[], help="a folder of this machine to show there, read-only")
    parser.add_argument("--copy", action="append", default=[], help="a file or folder of this machine to copy there")
    parser.add_argument(
        "--pass-variable", action="append", default=PASSED, help=f"pattern of variables; always: {' '.join(PASSED)}"
    )
    return parser.parse_args()


class Machine:
    def __init__(self, arguments: argparse.Namespace):
        self.folder: Path = arguments.folder.resolve()
        self.owner = "root" if arguments.as_root else USER
        self.home = Path("/root" if arguments.as_root else f"/home/{USER}")
        self.project = self.home / "tunesmith"
        self.passed = {
            name: value
            for name, value in os.environ.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.pass_variable)
        }

    def install_system(self, suite: str, mirror: str, components: str) -> None:
        command = ["debootstrap", "--variant=minbase", f"--components={components}", suite, str(self.folder), mirror]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        for file in NETWORK_FILES:
            self.copy(file)
        (self.folder / "etc/apt/apt.conf.d/90assume-yes").write_text('APT::Get::Assume-Yes "true";\n')

    def copy(self, path: str) -> None:
        target = self.inside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--remove-destination", "-T", path, str(target)], check=True)

    def inside(self, path: str | Path) -> Path:
        """Where this machine has a path of that one."""
        return self.folder / str(path).lstrip("/")

    def start(self, bound: list[str]) -> int:
        """Mount the kernel's file systems and the folders `bound`, which nobody else sees, and add a user."""
        for name in ("dev", "sys"):
            subprocess.run(["mount", "--rbind", f"/{name}", str(self.folder / name)], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", str(self.folder / "proc")], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(self.folder / "dev/shm")], check=True)
        for path in bound:
            target = self.inside(path)
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", "-o", "ro", path, str(target)], check=True)
        return self.run(f"useradd --create-home {USER}", "root")

    def clone_project(self, copied: list[str]) -> int:
        for path in copied:
            self.copy(path)
        subprocess.run(["git", "clone", "--quiet", "--no-local", ROOT, self.inside(self.project)], check=True)
        return self.run(f"chown -R {self.owner}: {self.project}", "root")

    def run(self, command: str, user: str, folder: Path = Path("/")) -> int:
        environ = {"PATH": PATH, "HOME": "/root" if user == "root" else str(self.home), **self.passed}
        if user == "root":
            environ["DEBIAN_FRONTEND"] = "noninteractive"
        argv = ["chroot", f"--userspec={user}:{user}", str(self.folder), "sh", "-c", f"cd {folder} && {command}"]
        return subprocess.run(argv, env=environ, stdin=subprocess.DEVNULL, check=False).returncode

    def size(self, path: Path) -> str:
        done = subprocess.run(["du", "-sxh", self.inside(path)], capture_output=True, text=True, check=True)
        return done.stdout.split()[0]


def in_namespaces(arguments: argparse.Namespace) -> int:
    """Run this program again with mounts and processes of its own, and remove the machine's folder after it."""
    if arguments.folder.exists():
        sys.exit(f"error: {arguments.folder} exists. Name a folder that does not.")
    if os.geteuid() or any(shutil.which(tool) is None for tool in ("debootstrap", "git", "unshare")):
        sys.exit("error: this needs root, debootstrap and git. On Debian or Ubuntu: apt install debootstrap git")
    options = ["--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
    init = ["sh", "-c", '"$@"; exit $?', "init"]  # waits for orphans too, as the first process has to
    command = ["unshare", *options, *init, sys.executable, "-m", "tests.bare_machine", *sys.argv[1:]]
    code = subprocess.run(command, env={**os.environ, IN_NAMESPACES: "1"}, check=False).returncode
    if not arguments.keep:
        shutil.rmtree(arguments.folder, ignore_errors=True)  # the mounts are gone with their process
    return code


def run_commands(arguments: argparse.Namespace) -> int:
    """Make the machine and run the commands there, until one fails. Prints the seconds of each."""
    machine = Machine(arguments)
    mirror = arguments.mirror or apt_mirror(arguments.distribution)
    components = "main,universe" if arguments.distribution == "Ubuntu" else "main"
    line = readme_line()
    steps: list[tuple[str, Callable[[], int | None]]] = [
        (f"debootstrap {arguments.suite}", lambda: machine.install_system(arguments.suite, mirror, components)),
        ("its mounts and its user", lambda: machine.start(arguments.bind)),
        (line, lambda: machine.run(f"apt-get update -qq && {line} -qq >/dev/null", "root")),
        ("a clone of the project", lambda: machine.clone_project(arguments.copy)),
    ]
    for command in ["make setup"] + ["make demo"] * arguments.demo + ["make test"] * arguments.test:
        steps.append((command, lambda command=command: machine.run(command, machine.owner, machine.project)))
    report = []
    code = None
    for title, action in steps:
        print(f"[bare machine] {title}", flush=True)
        started = time.monotonic()
        code = action()
        report.append(f"{time.monotonic() - started:6.0f} s  {title}" + (f": exit code {code}" if code else ""))
        if code:
            break
    print("\n".join([f"\n[bare machine] {arguments.suite}:", *report]))
    print(f"{machine.size(machine.project)} the project with its .venv, {machine.size(Path('/'))} the whole machine")
    return code or 0


def main() -> None:
    arguments = parse_arguments()
    sys.exit(run_commands(arguments) if IN_NAMESPACES in os.environ else in_namespaces(arguments))


if __name__ == "__main__":
    main()
