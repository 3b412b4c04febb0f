"""Kill pruning runs at random moments, resume them, and compare the result byte for byte with an undisturbed run.

    python benchmarks/kill_resume.py [--kills 50] [--method sparsegpt]

Uses the reference model. Four kills of five fall uniformly over the time in which layers are pruned and the folder is
completed, every fifth over the whole run, start of Python included; a kill that comes too late is drawn again. Writes
benchmarks/results/kill_resume.json and .md.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparsedeploy import progress
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.reference import reference_model

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--preset", default="default", help="of the reference model")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    progress.show()
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as place:
        result = measure(Path(place), arguments)
    write_json(RESULTS / "kill_resume.json", result)
    write_text(RESULTS / "kill_resume.md", markdown(result))
    print(markdown(result))
    sys.exit(0 if result["identical"] == result["kills"] else 1)


def measure(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run, kill and resume; returns counts and where each kill fell."""
    model = reference_model(arguments.preset)
    command = [
        *(sys.executable, "-m", "sparsedeploy", "prune", str(model), "--quiet", "--device", "cpu"),
        *("--sparsity", "0.6", "--method", arguments.method, "--allocation", "owl"),
        *("--data", "stdlib", "--samples", str(arguments.samples)),
    ]
    whole = place / "whole"
    begun, duration = undisturbed([*command, "-o", str(whole)], whole)
    expected = hashes(whole)
    draw = random.Random(arguments.seed)
    output = place / "killed"
    moments: list[dict[str, Any]] = []
    late = 0
    with progress.bar("kill and resume", arguments.kills, "kills") as advance:
        while len(moments) < arguments.kills:
            number = len(moments)
            anywhere = number % 5 == 4
            seconds = draw.uniform(0, duration) if anywhere else draw.uniform(0, duration - begun)
            if kill_after([*command, "-o", str(output)], seconds, output, from_start=anywhere):
                late += 1
                shutil.rmtree(output)
                continue
            moment = {"seconds": seconds, "from_start": anywhere, "layers": finished_layers(output), "again": False}
            # Every third run is killed a second time while it resumes. A kill between the end and the exit leaves a
            # whole output: nothing to resume.
            if number % 3 == 0 and not output.exists():
                again = [*command, "-o", str(output), "--resume"]
                moment["again"] = not kill_after(again, draw.uniform(0, duration), output, from_start=True)
            if not output.exists():
                subprocess.run([*command, "-o", str(output), "--resume"], check=True, stdout=subprocess.DEVNULL)
            moment["identical"] = hashes(output) == expected and not list(place.glob(".*"))
            shutil.rmtree(output)
            moments.append(moment)
            advance(1, f"{sum(one['identical'] for one in moments)} identical")
    return {
        "command": " ".join(["sparsedeploy", "prune", model.name, *command[5:]]),
        "kills": arguments.kills,
        "killed_again": sum(one["again"] for one in moments),
        "identical": sum(one["identical"] for one in moments),
        "drawn_again": late,
        "undisturbed_seconds": duration,
        "start_seconds": begun,
        "seed": arguments.seed,
        "moments": moments,
    }


def undisturbed(command: list[str], output: Path) -> tuple[float, float]:
    """Run to the end; seconds until the output is begun, and in all."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(partial(output), process)
    begun = time.perf_counter() - start
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return begun, time.perf_counter() - start


def kill_after(command: list[str], seconds: float, output: Path, *, from_start: bool) -> bool:
    """Kill a run so many seconds after its start, or after it began its output; whether it was finished before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    if not from_start:
        wait_for(partial(output), process)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return process.wait() == 0


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the path exists or the process ends."""
    while process.poll() is None and not path.exists():
        time.sleep(0.002)


def partial(output: Path) -> Path:
    """The folder in which a run makes its output."""
    return output.parent / f".{output.name}.partial"


def finished_layers(output: Path) -> int:
    """Layers that the journal of the interrupted run names."""
    journal = partial(output) / "journal.jsonl"
    return journal.read_text().count('"layer"') if journal.is_file() else 0


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def markdown(result: dict[str, Any]) -> str:
    layers = [moment["layers"] for moment in result["moments"]]
    spread = ", ".join(f"{layers.count(count)} after {count}" for count in sorted(set(layers)))
    return (
        f"# Kill and resume\n\n{result['identical']} of {result['kills']} results are identical, byte for byte, to the "
        f"undisturbed run.\n\nSIGKILL at a random moment ({result['undisturbed_seconds']:.1f} s undisturbed, of which "
        f"{result['start_seconds']:.1f} s until the output was begun), {result['killed_again']} of them killed again "
        f"while resuming. Finished layers at the kill: {spread}. {result['drawn_again']} kills came after the end and "
        f"were drawn again.\n\n    {result['command']}\n"
    )


if __name__ == "__main__":
    main()
