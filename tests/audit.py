"""`make audit`: the pins of constraints.txt against OSV, a database of known vulnerabilities, by pip-audit; exit code 1 for findings, and for nothing else.

    python tests/audit.py pip-audit
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parents[1] / "constraints.txt"
OPTIONS = ["--no-deps", "--disable-pip", "--vulnerability-service", "osv", "--format", "json", "--progress-spinner", "off"]


def audit(program: str) -> int:
    """Print what is known of the pins, one vulnerability a line; returns the exit code."""
    result = subprocess.run([program, "--requirement", str(PINS), *OPTIONS], capture_output=True, text=True)
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        why = (result.stderr.strip() or result.stdout.strip() or "it said nothing").splitlines()[-1]
        print(f"audit: not done, pip-audit could not ask for vulnerabilities (is there a connection?): {why[:200]}")
        return 0
    found = [(package, known) for package in packages for known in package.get("vulns", ())]
    for package, known in found:
        print(f"{package['name']} {package['version']}: {known['id']}, mended in {', '.join(known['fix_versions']) or 'no version yet'}")
    print(f"audit: {len(found)} known vulnerabilities in {len(packages)} pinned packages")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(audit(sys.argv[1]))
