"""Kill pruning runs at random moments, resume them, and compare the result byte for byte with an undisturbed run.

    python benchmarks/kill_resume.py [--kills 50] [--method sparsegpt]

Uses the tiny reference model. Writes benchmarks/results/kill_resume.json and .md.
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
    parser.add_argument("--samples", type=int, default=32)
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
    command = [
        *(sys.executable, "-m", "sparsedeploy", "prune", str(reference_model("tiny")), "--quiet", "--device", "cpu"),
        *("--sparsity", "0.6", "--method", arguments.method, "--allocation", "owl"),
        *("--data", "stdlib", "--samples", str(arguments.samples)),
    ]
    whole = place / "whole"
    start = time.perf_counter()
    subprocess.run([*command, "-o", str(whole)], check=True, stdout=subprocess.DEVNULL)
    duration = time.perf_counter() - start
    expected = hashes(whole)
    draw = random.Random(arguments.seed)
    identical = 0
    moments = []
    with progress.bar("kill and resume", arguments.kills, "kills") as advance:
        for number in range(arguments.kills):
            output = place / "killed"
            share = draw.random()
            killed = finished = kill_after([*command, "-o", str(output)], share * duration)
            layers = finished_layers(output)
            if not finished:
                # Every third run is killed a second time while it resumes.
                if number % 3 == 0:
                    kill_after([*command, "-o", str(output), "--resume"], draw.random() * duration)
                if not output.exists():
                    subprocess.run([*command, "-o", str(output), "--resume"], check=True, stdout=subprocess.DEVNULL)
            same = hashes(output) == expected and not list(place.glob(".*"))
            identical += same
            moments.append({"share": share, "finished_before": killed, "layers": layers, "identical": same})
            shutil.rmtree(output)
            advance(1, f"{identical} identical")
    return {
        "command": " ".join(["sparsedeploy", *command[3:]]),
        "kills": arguments.kills,
        "identical": identical,
        "undisturbed_seconds": duration,
        "seed": arguments.seed,
        "moments": moments,
    }


def kill_after(command: list[str], seconds: float) -> bool:
    """Start a run and kill it with SIGKILL after so many seconds; whether it was finished before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return process.wait() == 0


def finished_layers(output: Path) -> int:
    """Layers that the journal of the interrupted run names."""
    journal = output.parent / f".{output.name}.partial" / "journal.jsonl"
    return journal.read_text().count('"layer"') if journal.is_file() else 0


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def markdown(result: dict[str, Any]) -> str:
    caught = [moment["layers"] for moment in result["moments"] if not moment["finished_before"]]
    by_layers = ", ".join(f"{caught.count(layers)} after {layers} layers" for layers in sorted(set(caught)))
    return (
        f"# Kill and resume\n\n{result['identical']} of {result['kills']} results are identical, byte for byte, to the "
        f"undisturbed run.\n\nKilled by SIGKILL at a uniformly random moment of the run "
        f"({result['undisturbed_seconds']:.1f} s undisturbed), every third one killed again while resuming. "
        f"Kills that caught the run: {by_layers or 'none'}; {result['kills'] - len(caught)} came after its end.\n\n"
        f"    {result['command']}\n"
    )


if __name__ == "__main__":
    main()
