"""Compares what is installed with the advisories of OSV; 1 if a fix is out that is not taken.

    uv run python .ci/audit.py

Without the network it warns and ends with 0; a test holds Ray, MLflow and torch to the versions of
`doctor.MINIMUM_VERSIONS` in any case. Advisories that were looked at and do not concern midas stand
in pyproject.toml, `[tool.midas.reviewed-advisories]`, with the reason.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

OSV = "https://api.osv.dev/v1/query"
PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def advisories(url: str) -> list[dict[str, Any]] | None:
    """What pip-audit found: `name`, `version`, and `vulns` of each package; None without answer."""
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv"]
    command += ["--osv-url", url, "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run([*command, "--skip-editable"], capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["dependencies"]
    except ValueError:
        said = done.stderr.strip() or "no word"
        print(f"warning: no audit, {said.splitlines()[-1]}", file=sys.stderr)
        return None


def main() -> int:
    """Print what was found; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--osv-url", default=OSV)
    parser.add_argument("--project", type=Path, default=PROJECT)
    args = parser.parse_args()
    settings = tomllib.loads(args.project.read_text())
    reviewed = settings.get("tool", {}).get("midas", {}).get("reviewed-advisories", {})
    packages = advisories(args.osv_url)
    if packages is None:
        return 0
    to_take = 0
    for package in packages:
        for found in package.get("vulns", []):
            known = {found["id"], *found["aliases"]} & set(reviewed)
            fixed = ", ".join(found["fix_versions"])
            verdict = f"reviewed: {reviewed[known.pop()]}" if known else "take it" * bool(fixed)
            to_take += verdict == "take it"
            told = f"{package['name']} {package['version']}: {found['id']}"
            print(f"{told}, fixed in {fixed or 'no version'}; {verdict}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    print(f"{len(packages)} packages, {to_take} fixes to take; not looked up: {', '.join(skipped)}")
    return int(to_take > 0)


if __name__ == "__main__":
    sys.exit(main())
