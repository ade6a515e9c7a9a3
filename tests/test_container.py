"""The Dockerfile copies what exists and what the package needs, and its commands are ones that a shell can read."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = re.sub(r"^ *#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))


def test_the_context_holds_what_is_copied_and_what_the_package_is_made_of():
    everything, *rules = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    admitted = [rule[1:] for rule in rules if rule.startswith("!")]
    assert everything == "*"
    assert all(list(ROOT.glob(name)) for name in admitted)
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    files = {re.sub(r"\$\{(\w+)\}", lambda match: ARGUMENTS[match[1]], name) for name in copied} - {"."}
    setup = (ROOT / "setup.py").read_text()
    parts = {path.resolve().relative_to(ROOT).parts[0] for path in (ROOT / "dmtjepa").iterdir()}
    read = {name.split("/")[0] for name in re.findall(r'Path\("([^"]+)"\)', setup)}
    for name in files | parts | read:
        assert any(fnmatch(name, rule) for rule in admitted), f".dockerignore leaves out {name}"


def test_commands_and_arguments():
    for command in re.findall(r"^RUN (?:--mount=\S+ +)?(.*)$", DOCKERFILE, re.MULTILINE):
        subprocess.run(["sh", "-n", "-c", command], check=True, timeout=600)
    setup = (ROOT / "setup.py").read_text()
    (entry,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', DOCKERFILE, re.MULTILINE)
    assert f'"{entry} = ' in setup
    for extra in ARGUMENTS["EXTRAS"].split(","):
        assert f'"{extra}": [' in setup
    table = re.findall(r"^\| `([A-Z]+)` \| `(\S+)` \|", (ROOT / "docs/container.md").read_text(), re.MULTILINE)
    assert dict(table) == ARGUMENTS
