"""The GPUs and what is compiled for them: torch and its companions, NCCL, Transformer Engine, Apex."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from packaging.specifiers import SpecifierSet

from megarl.doctor.finding import Finding, gibibytes, ok
from megarl.doctor.packages import Packages, Ranges, check_range, fits, ranges_of
from megarl.parallel.environment import PlatformName

GPU_QUERY = "name,memory.total,driver_version,compute_cap"
"""What nvidia-smi is asked for, in the order of Gpu."""

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")

# Major version of CUDA -> oldest driver for it (CUDA Toolkit release notes, "CUDA minor version compatibility").
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_TE = "transformer-engine"
_FLASH, _FLASH_3 = "flash-attn", "flash-attn-3"
_HOPPER = 9.0
_TE_CORES = (f"{_TE}-cu12", f"{_TE}-cu13")
_GPU_ADAM = "Megatron takes its Adam, which needs a GPU, where the platform is cpu"


@dataclass(frozen=True)
class Build:
    """What a version.py of torch or a companion says. version: with its label, as 2.13.0+cpu. cuda: None on CPU."""

    version: str
    cuda: str | None = None

    @property
    def label(self) -> str:
        """The part after the plus: cpu, cu130, or nothing."""
        return self.version.partition("+")[2]


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it. memory_bytes, compute_capability: 0 where the driver doesn't say."""

    name: str
    memory_bytes: int
    driver: str
    compute_capability: float = 0.0


def build_of(source: str) -> Build | None:
    """Return the build that the text of a version.py describes, or None where it names no version."""
    version = re.search(r"^__version__[^=\n]*= *['\"]([^'\"]+)['\"]", source, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", source, re.MULTILINE)
    return Build(version[1], cuda[1] if cuda else None) if version else None


def parse_gpus(listing: str) -> tuple[Gpu, ...]:
    """Read what nvidia-smi prints for ``GPU_QUERY``: CSV, memory in MiB."""
    gpus = []
    for line in filter(None, map(str.strip, listing.splitlines())):
        name, memory, driver, capability = (part.strip() for part in line.rsplit(",", 3))
        known = float(capability) if capability.replace(".", "", 1).isdigit() else 0.0
        gpus.append(Gpu(name, int(memory) * 2**20 if memory.isdigit() else 0, driver, known))
    return tuple(gpus)


def check_torch(packages: Packages, build: Build | None, ranges: Ranges, platform: PlatformName) -> Finding:
    """Judge torch: there, in range, and a build for the platform. build: read from torch/version.py."""
    finding = check_range("torch", packages, ranges, without="nothing but checks of configs and plans runs")
    if finding.level != "ok":
        return finding
    if build is None:
        found = f"{finding.found}, but its files are not all there (torch/version.py)"
        return Finding("FAIL", "torch", found, "pip install --force-reinstall --no-deps torch")
    found = f"{finding.found}, {f'CUDA {build.cuda}' if build.cuda else 'CPU'} build"
    if platform == "cuda" and not build.cuda:
        return Finding("FAIL", "torch", f"{found}, but the platform is cuda", "install torch's CUDA build")
    return ok("torch", found)


def check_gpus(
    gpus: tuple[Gpu, ...], refusal: str, build: Build | None, platform: PlatformName, environ: Mapping[str, str]
) -> Finding:
    """Judge GPUs and driver. refusal: why nvidia-smi lists none, empty where it did or is not there."""
    if not gpus:
        if platform == "cpu" and not refusal:
            return ok("gpus", "none; the platform is cpu")
        if not refusal and not environ.get("MEGARL_PLATFORM"):
            found = "the driver shows some, but there is no nvidia-smi to list them"
            return Finding("warn", "gpus", found, "docker: -e NVIDIA_DRIVER_CAPABILITIES=compute,utility")
        found = f"none: {refusal}" if refusal else "none are listed (no nvidia-smi), but the platform is cuda"
        fix = "install or restart the NVIDIA driver (docker: --gpus all), or export MEGARL_PLATFORM=cpu"
        return Finding("FAIL" if platform == "cuda" else "warn", "gpus", found, fix)
    kinds = Counter((gpu.name, gpu.memory_bytes) for gpu in gpus)
    found = ", ".join(
        f"{number} x {name} ({gibibytes(memory) if memory else 'memory not told'})"
        for (name, memory), number in kinds.items()
    )
    found += f", driver {gpus[0].driver}"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if platform == "cuda" and visible is not None:
        found += f"; CUDA_VISIBLE_DEVICES={visible}"
    if platform == "cpu":
        if build is not None and not build.cuda and not environ.get("MEGARL_PLATFORM"):
            fix = "install torch's CUDA build, or export MEGARL_PLATFORM=cpu if that is meant"
            return Finding("warn", "gpus", f"{found}; unused, since torch is a CPU build", fix)
        return ok("gpus", f"{found}; unused, since the platform is cpu")
    oldest = _OLDEST_DRIVER.get(int((build.cuda if build and build.cuda else "0").split(".")[0]), 0)
    driver = gpus[0].driver.split(".")[0]
    if build is not None and driver.isdigit() and int(driver) < oldest:
        fix = f"update the driver to {oldest} or later, or install a torch for an older CUDA"
        return Finding("warn", "gpus", f"{found}; torch's CUDA {build.cuda} asks for driver {oldest}", fix)
    return ok("gpus", found)


def check_companions(packages: Packages, builds: Mapping[str, Build], torch: Build | None) -> list[Finding]:
    """Judge torchvision and its like, which transformers and vLLM import where they find them.

    builds: of torch's companions, by name, from their own version.py: their metadata leaves out cpu or cuda.
    """
    findings = []
    for name in (name for name in COMPANIONS if name in packages):
        package = packages[name]
        build = builds.get(name, Build(package.version))
        asked = ranges_of(package.requires).get("torch", SpecifierSet())
        here = packages["torch"].version if "torch" in packages else "not installed"
        remove = f"pip uninstall {name} (megarl doesn't need it), or install the build for this torch"
        if torch is not None and not torch.cuda and build.label.startswith("cu"):
            found = f"{build.version} is a CUDA build beside a CPU torch: transformers can't load its models"
            findings.append(Finding("FAIL", name, found, remove))
        elif torch is not None and torch.cuda and build.label == "cpu":
            findings.append(Finding("warn", name, f"{build.version} is a CPU build beside a CUDA torch", remove))
        elif not fits(here, asked):
            found = f"{build.version} is compiled for torch{asked}, and torch is {here}"
            findings.append(Finding("FAIL", name, found, remove))
        else:
            findings.append(ok(name, build.version))
    return findings or [ok("torchvision", "not installed, nor torchaudio or torchcodec; none is needed")]


def check_nccl(packages: Packages, platform: PlatformName) -> Finding:
    """Judge NCCL by the distributions that bring it, against the one that torch pins."""
    here = {name: package.version for name, package in packages.items() if name.startswith("nvidia-nccl-cu")}
    found = ", ".join(f"{version} ({name})" for name, version in here.items())
    if platform == "cpu":
        return ok("nccl", f"{found}; unused on cpu" if here else "none; cpu ranks talk over gloo")
    if not here:
        return ok("nccl", "no wheel of it: torch brings its own, or takes the system's")
    asked = ranges_of(packages["torch"].requires if "torch" in packages else ())
    wrong = [name for name in here if name in asked and not fits(here[name], asked[name])]
    if len(here) > 1 or wrong:
        wanted = next((f"{name}{asked[name]}" for name in asked if name.startswith("nvidia-nccl-cu")), "")
        fix = f"pip uninstall {' '.join(here)}" + (f", then pip install '{wanted}'" if wanted else "")
        return Finding("warn", "nccl", f"{found}; torch asks for {wanted or 'another'}", fix)
    return ok("nccl", found)


def check_transformer_engine(packages: Packages, ranges: Ranges, platform: PlatformName) -> Finding:
    """Judge Transformer Engine. Without all its parts ``import megatron.core`` fails: it expects ImportError alone."""
    package = packages.get(_TE)
    if package is None:
        if platform == "cpu":
            return ok(_TE, "not installed; it is for GPUs")
        found = "not installed: Megatron's own layers are slower"
        return Finding("warn", _TE, found, _install_te(ranges.get(_TE, SpecifierSet())))
    fix = f"pip uninstall {_TE}"
    if platform == "cuda":
        fix = _install_te(SpecifierSet(f"=={package.version}"))
    # Built from source it is one distribution with compiled code. From wheels it is a pure one, and two parts.
    parts = {name: packages[name].version for name in (*_TE_CORES, f"{_TE}-torch") if name in packages}
    if package.pure:
        cores = [name for name in _TE_CORES if name in parts]
        lacking = [*([] if cores else [f"{_TE}-cu12 or -cu13"]), *([] if f"{_TE}-torch" in parts else [f"{_TE}-torch"])]
        if lacking:
            found = f"{package.version} lacks {' and '.join(lacking)}: `import megatron.core` fails"
            return Finding("FAIL", _TE, found, fix)
        if set(parts.values()) != {package.version}:
            others = ", ".join(f"{name} {version}" for name, version in parts.items())
            return Finding("FAIL", _TE, f"{package.version} with {others}: `import megatron.core` fails", fix)
    if platform == "cpu":
        return Finding("warn", _TE, f"{package.version}: {_GPU_ADAM}", fix)
    finding = check_range(_TE, packages, ranges)
    return finding if finding.level == "ok" else replace(finding, fix=_install_te(ranges[_TE]))


def _install_te(wanted: SpecifierSet) -> str:
    # Without [pytorch] pip installs the bare package, which breaks Megatron.
    return f"pip install --no-build-isolation '{_TE}[pytorch]{wanted}'"


def check_flash_attention(packages: Packages, gpus: tuple[Gpu, ...], platform: PlatformName) -> Finding:
    """Judge flash-attn: before Hopper, Transformer Engine has no other attention for packed rows.

    cuDNN's is for compute capability 9.0 and later. What it then takes holds all scores of a row at once.
    """
    package = packages.get(_FLASH)
    if platform == "cpu":
        return ok(_FLASH, "not installed; it is for GPUs" if package is None else f"{package.version}; unused on cpu")
    older = sorted({gpu.compute_capability for gpu in gpus if 0 < gpu.compute_capability < _HOPPER})
    third = packages.get(_FLASH_3)
    if third is not None and any(gpu.compute_capability == _HOPPER for gpu in gpus):
        return ok(_FLASH, f"{third.version}, for Hopper; Transformer Engine prefers cuDNN's unless NVTE_FUSED_ATTN=0")
    if package is not None:
        return ok(_FLASH, package.version)
    if older and _TE in packages:
        found = f"not installed: on compute capability {older[0]:g} packed attention is slower"
        fix = f"pip install --no-build-isolation {_FLASH} (it is compiled against the torch that is here)"
        return Finding("warn", _FLASH, found, fix)
    return ok(_FLASH, "not installed; cuDNN and torch have attention of their own")


def check_apex(
    version: str | None, has_optimizers: bool, has_kernels: bool, platform: PlatformName, has_te: bool
) -> Finding:
    """Judge Apex. The package of that name on PyPI is another one.

    version: None where no folder or distribution ``apex`` is found. has_optimizers: apex/optimizers is there, as in
    NVIDIA's. has_kernels: the module amp_C is there.
    """
    if version is None:
        return ok("apex", "not installed; Megatron uses torch's kernels")
    fix = "pip uninstall apex"
    if not has_optimizers:
        found = f"{version} is not NVIDIA's (no apex.optimizers), but Megatron takes it for that"
        return Finding("warn", "apex", found, f"{fix}; build NVIDIA's from source, or use a container that has it")
    if platform == "cpu":
        return Finding("warn", "apex", f"{version}: {_GPU_ADAM}", fix)
    if not has_kernels:
        found = f"{version} was built without its CUDA kernels (no amp_C)"
        fix += ", or build it with --cpp_ext and --cuda_ext"
        return Finding("warn" if has_te else "FAIL", "apex", found, fix)
    return ok("apex", f"{version}, NVIDIA's")
