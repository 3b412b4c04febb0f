"""The ``sparsedeploy`` command, also as ``python -m sparsedeploy``."""

import os
import signal


def main() -> None:
    """Import the command line, which takes a moment, and run it; a signal meanwhile ends the process without a word."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os._exit(128 + number))
    from sparsedeploy.startup import quick_start

    quick_start()
    from sparsedeploy.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
