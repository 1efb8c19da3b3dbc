"""Each host works with the others absent, and an absent one is named with its extra."""

import itertools
import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import absent_hosts

HOSTS = ("nncf", "openvino", "brevitas", "basicsr")
# None, one, all but one, all: what needs two others at once would be an odd import.
SUBSETS = [subset for count in (0, 1, 3, 4) for subset in itertools.combinations(HOSTS, count)]
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SAME_MODULE = {"opencv-python": "opencv-python-headless"}


def closure(requirements):
    """Names of all packages that pip would install."""
    found, left = set(), [Requirement(text) for text in requirements]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        name = SAME_MODULE.get(name, name)
        if name in found or name == "condiquant-plugin":
            continue
        found.add(name)
        try:
            further = map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # for another platform
            continue
        left += [r for r in further if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def modules():
    """Top-level modules by the packages that bring them."""
    return {
        module: {canonicalize_name(package) for package in packages}
        for module, packages in packages_distributions().items()
    }


@pytest.fixture(scope="module")
def server():
    with subprocess.Popen(
        [sys.executable, absent_hosts.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("present", SUBSETS, ids=lambda hosts: "+".join(hosts) or "none")
def test_hosts_do_not_need_each_other(server, modules, tmp_path, present):
    brought = closure(itertools.chain(*EXTRAS.values()))
    installed = closure([*PROJECT["dependencies"], *(r for host in present for r in EXTRAS[host])])
    hidden = [m for m, packages in modules.items() if packages <= brought - installed]
    assert set(HOSTS) - set(present) <= set(hidden)
    application = closure([*EXTRAS["recipes"], *EXTRAS["upscale"], "opencv-python"])
    late = [m for m in hidden if modules[m] <= application]
    task = {"present": present, "hidden": hidden, "late": late, "folder": str(tmp_path)}
    server.stdin.write(json.dumps(task) + "\n")
    server.stdin.flush()
    assert server.stdout.readline().strip() == "0", (tmp_path / "log").read_text()[-3000:]
