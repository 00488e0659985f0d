"""Where and with what a result was made."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gstlib.data import Images


def processor(device: torch.device) -> dict:
    """What of `provenance` tells kinds of processor apart: runs of a seed on one kind share their course bit for bit."""
    return {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {
        "device": _cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability()}


def provenance(images: Images, device: torch.device, profile: str, seconds: float, replicas: int = 1) -> dict:
    """Where and with what a result was made: data, how many training and test images of them, device, versions, commit,
    date; no path and no host name."""
    return {
        "data": images.name, "data_title": images.title, "fingerprint": images.fingerprint,
        "images": [len(images.train_y), len(images.test_y)],
        "profile": profile, "device_type": device.type, **processor(device), "threads": torch.get_num_threads(),
        "seconds": round(seconds, 3), "replicas": replicas,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(), "python": platform.python_version(),
        "versions": {package: _version(package) for package in ("gstlib", "torch", "torchvision", "numpy")}
        | ({} if device.type == "cpu" else {"triton": _version("triton"), "cudnn": str(torch.backends.cudnn.version())}),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source tree"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that gstlib's source is at, with "+changes" where gstlib/ differs from it; "unknown" outside git.

    The environment variable GSTLIB_COMMIT stands in where the source travels without its history.
    """
    if stated := os.environ.get("GSTLIB_COMMIT"):
        return stated
    here = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "training/provenance.py")  # it may be installed in another's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
