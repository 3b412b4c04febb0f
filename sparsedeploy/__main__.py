"""``python -m sparsedeploy``: the same as the ``sparsedeploy`` command."""

from sparsedeploy.cli.main import main

if __name__ == "__main__":
    main()
