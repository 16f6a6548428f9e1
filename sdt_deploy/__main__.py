"""``python -m sdt_deploy``: the command line."""

from sdt_deploy.cli import main

if __name__ == "__main__":
    main()
