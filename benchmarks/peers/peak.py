"""Peak memory of this process alone."""

from pathlib import Path


def peak_bytes() -> int:
    """The largest resident size since this program was started (Linux).

    Not ``getrusage``'s: that one counts what the parent had in memory when it started us.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
