"""Hardware profiles: what one device computes, moves and holds, read from YAML files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from io import StringIO
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mergeopd.config.suggest import did_you_mean
from mergeopd.config.values import NonEmptyText, OpenFraction, Positive, PositiveInt, Strict
from mergeopd.errors import RecipeError
from mergeopd.messages import option_problem, shown
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import write_atomic

DEVICES = tuple(
    sorted(
        file.name.removesuffix(".yaml")
        for file in resources.files("mergeopd.planner").joinpath("hardware").iterdir()
        if file.name.endswith(".yaml")
    )
)
_SPEC = re.compile(r"([a-z][a-z0-9]*?)(?:x(\d+))?(?::(.*))?", re.IGNORECASE)
_GIB = 2**30
Share = Annotated[float, Field(gt=0.0, le=1.0)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Rate(Strict):
    """Peak operations per second of matrix products in one dtype, and the share of them that passes reach.

    `table` has measured rates of square-like products by their smallest side; it replaces the other two.
    """

    peak: Positive
    attainable: Share
    table: tuple[tuple[PositiveInt, Positive], ...] = ()

    def at(self, side: float) -> float:
        """Return operations per second of a product whose smallest side is `side`."""
        if not self.table:
            return self.peak * self.attainable
        if side <= self.table[0][0]:
            return self.table[0][1] * side / self.table[0][0]
        for (low, slow), (high, fast) in pairwise(self.table):
            if side <= high:
                part = log(side / low) / log(high / low)
                return exp(log(slow) + part * (log(fast) - log(slow)))
        return self.table[-1][1]


class Overheads(Strict):
    """Seconds that do not depend on the number of tokens: launching kernels, Python."""

    forward_layer_s: NotNegative
    """one layer forward"""
    backward_layer_s: NotNegative
    """one layer backward"""
    decode_layer_s: NotNegative
    """one layer of one decoding step"""
    decode_step_s: NotNegative
    """one decoding step: head, sampling, bookkeeping"""
    grid_layer_s: NotNegative = 0.0
    """one layer of Megatron forward and backward, beyond the two above"""
    message_s: NotNegative = 0.0
    """one collective"""
    update_s: NotNegative = 0.0
    """one update: preparation, statistics, events"""


class Elementwise(Strict):
    """Bytes per second that passes read and write outside matrix products."""

    forward: Positive
    backward: Positive
    loss: Positive
    sampling: Positive
    optimizer: Positive


class Profile(Strict):
    """One device and its surroundings. Numbers are bytes, operations and seconds."""

    profile: Literal[1]
    """version of the format"""
    name: NonEmptyText
    title: NonEmptyText
    kind: Literal["gpu", "cpu"]
    sources: tuple[NonEmptyText, ...]
    """origin of every number: a data sheet, a measurement, or an assumption"""
    cores: PositiveInt | None = None
    """cores of a CPU; rates are those of one core"""
    per_machine: PositiveInt = 8
    """devices in a machine"""
    memory_gib: Positive
    """memory of a device, or of the machine for a CPU"""
    usable: OpenFraction | Annotated[float, Field(ge=1.0, le=1.0)]
    """share of the memory that a run can fill"""
    host_memory_gib: Positive | None = None
    """main memory of a machine with GPUs"""
    process_bytes: NotNegative
    """memory of a process before it has a model"""
    grid_process_bytes: NotNegative = 0.0
    """what Megatron and its process groups add to it"""
    rates: dict[Literal["float32", "bfloat16", "float64"], Rate]
    attention: Share
    """share of the rate of matrix products that attention reaches"""
    memory_bandwidth: Positive
    """bytes per second of a device's memory"""
    elementwise: dict[Literal["float32", "bfloat16", "float64"], Elementwise]
    """of passes in a dtype; that of float32 for others"""
    link_bandwidth: Positive
    """bytes per second between devices of a machine, each way"""
    network_bandwidth: Positive
    """bytes per second between machines, for each device"""
    link_attainable: Share
    host_bandwidth: Positive
    """bytes per second between main memory and a device"""
    disk_bandwidth: Positive
    """bytes per second of a machine's disk"""
    overheads: Overheads

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def rate(self, dtype: str, side: float) -> float:
        """Return operations per second of matrix products in `dtype` whose smallest side is `side`."""
        rates = self.rates
        known = rates.get(dtype) or rates["float32"]  # type: ignore[call-overload]
        return float(known.at(side))

    def bandwidth(self, dtype: str, kind: str) -> float:
        """Return bytes per second of elementwise work of a kind, such as `forward`, in `dtype`."""
        rates = self.elementwise
        known = rates.get(dtype) or rates["float32"]  # type: ignore[call-overload]
        return float(getattr(known, kind))


@dataclass(frozen=True, slots=True)
class Hardware:
    """Devices of one kind. `name` is what the user wrote.

    `num_devices` are GPUs, or for a CPU the processes that the machine's cores are divided among.
    """

    name: str
    profile: Profile
    num_devices: int
    num_threads: int | None = None

    @property
    def threads(self) -> int:
        """Threads of a process on a CPU, of the machine's `num_threads` or cores; 1 on a GPU."""
        cores = self.num_threads or self.profile.cores or 1
        return max(1, cores // self.num_devices) if self.profile.is_cpu else 1

    @property
    def num_machines(self) -> int:
        return 1 if self.profile.is_cpu else -(-self.num_devices // self.profile.per_machine)

    @property
    def per_machine(self) -> int:
        """Processes of a machine."""
        return min(self.num_devices, self.num_devices if self.profile.is_cpu else self.profile.per_machine)

    @property
    def limit_bytes(self) -> int:
        """Memory that one process may fill."""
        whole = self.profile.memory_gib * self.profile.usable * _GIB
        return int(whole / self.num_devices if self.profile.is_cpu else whole)

    @property
    def host_limit_bytes(self) -> int | None:
        """Main memory that one process with a GPU may fill; None if it is not known, or on a CPU."""
        host = self.profile.host_memory_gib
        return None if host is None or self.profile.is_cpu else int(host * _GIB * 0.9 / self.per_machine)

    def with_devices(self, number: int) -> Hardware:
        return replace(self, num_devices=number)


def read_hardware(spec: str | None, num_processes: int | None = None) -> Hardware:
    """Return the hardware of an option: `h200x8`, `cpu:16,64GiB`, or a profile's file.

    Without one, the profile that `mergeopd plan --measure` wrote for this machine, else its CPU. A CPU has
    `num_processes` (default: 1); a GPU each.

    Raises RecipeError for an unknown device or a damaged file.
    """
    if spec is None:
        own = measured_file()
        file = own if own.is_file() else None
        spec = "this machine"
        profile = this_cpu() if file is None else read_profile(file)
        return Hardware(spec, profile, _count(spec, None, profile, num_processes))
    if spec.endswith((".yaml", ".yml")) or os.sep in spec:
        profile = read_profile(Path(spec))
        return Hardware(shown(Path(spec)), profile, _count(spec, None, profile, num_processes))
    match = _SPEC.fullmatch(spec.strip())
    name = match[1].lower() if match else spec
    known = [device for device in DEVICES if device == name]
    if match is None or not known:
        raise _unknown(spec, name)
    profile = read_profile(_packaged(name))
    if profile.is_cpu:
        if match[2]:
            raise _wrong(spec, "a CPU has cores, not a number", f"write {name}:{match[2]},64GiB")
        profile = _sized(profile, spec, match[3])
    elif match[3]:
        raise _wrong(spec, f"{name} has its own memory", f"write {name}x8 for eight of them")
    number = int(match[2]) if match[2] else None
    return Hardware(spec, profile, _count(spec, number, profile, num_processes))


def read_profile(file: Path) -> Profile:
    """Read a profile. Raises RecipeError with what is wrong."""
    try:
        data = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
        return Profile.model_validate(data)
    except OSError as error:
        raise _wrong(str(file), f"cannot be read: {error.strerror}", "name a profile") from error
    except (YAMLError, ValidationError, UnicodeDecodeError) as error:
        parts = error.errors() if isinstance(error, ValidationError) else []
        what = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in parts[:3])
        cause = f"not a hardware profile: {what or str(error).splitlines()[0]}"
        raise _wrong(str(file), cause, "write one with `mergeopd plan --measure`") from error


def write_profile(profile: Profile, file: Path) -> None:
    """Write a profile as YAML. Raises StorageError when the disk fails."""
    yaml = YAML()
    yaml.default_flow_style = None
    text = StringIO()
    yaml.dump(profile.model_dump(mode="json", exclude_none=True), text)
    with named_failures("write", file):
        write_atomic(file, "# Written by `mergeopd plan --measure`.\n" + text.getvalue())


def measured_file() -> Path:
    """Return where `mergeopd plan --measure` keeps this machine's profile."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "mergeopd" / "hardware.yaml"


def this_cpu() -> Profile:
    """Return the packaged profile of a CPU with this machine's cores and memory."""
    import psutil

    from mergeopd.distributed.launch import available_cores

    memory = psutil.virtual_memory().total / _GIB
    return read_profile(_packaged("cpu")).model_copy(
        update={"cores": available_cores(), "memory_gib": memory}
    )


def _sized(profile: Profile, spec: str, sizes: str | None) -> Profile:
    """Set the cores and the memory of `cpu:16,64GiB`; without them, this machine's."""
    if not sizes:
        return this_cpu()
    match = re.fullmatch(r"(\d+)\s*,\s*(\d+(?:\.\d+)?)\s*(GiB|GB|G)?", sizes, re.IGNORECASE)
    if match is None or not int(match[1]) or not float(match[2]):
        raise _wrong(spec, "a CPU is written as cores and memory", "write for example cpu:16,64GiB")
    gib = float(match[2]) * (1e9 / _GIB if (match[3] or "").upper() == "GB" else 1.0)
    return profile.model_copy(update={"cores": int(match[1]), "memory_gib": gib})


def _count(spec: str, written: int | None, profile: Profile, num_processes: int | None) -> int:
    if written == 0:
        raise _wrong(spec, "needs at least one device", "write for example h200x8")
    if num_processes is not None and num_processes < 1:
        raise RecipeError([option_problem("--nproc", f"{num_processes} processes", "start one or more")])
    if not profile.is_cpu and written is not None and num_processes not in (None, written):
        raise _wrong(spec, f"{num_processes} processes, but {written} GPUs", "there is one process per GPU")
    return num_processes or written or 1


def _packaged(name: str) -> Path:
    return Path(str(resources.files("mergeopd.planner").joinpath("hardware", f"{name}.yaml")))


def _unknown(spec: str, name: str) -> RecipeError:
    names: Sequence[str] = DEVICES
    listed = ", ".join(names)
    remedy = did_you_mean(name, names, "write the number behind an x, as in h200x8, or name a profile's file")
    return _wrong(spec, f"unknown hardware; known: {listed}", remedy)


def _wrong(spec: str, cause: str, remedy: str) -> RecipeError:
    return RecipeError([option_problem("--hardware", f"'{spec}': {cause}", remedy)])
