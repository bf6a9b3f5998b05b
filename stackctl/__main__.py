"""The installed command, and ``python -m stackctl``: what is imported first takes a while, in which Ctrl-C may come."""

import json
import sys


def main() -> None:
    """Run a command; one that is interrupted before it has begun ends as any other does."""
    try:
        from stackctl.cli import main as run
    except KeyboardInterrupt:
        told = {"code": "interrupted", "message": "interrupted", "hint": "run the command again to go on"}
        if "--json" in sys.argv:
            sys.stdout.write(json.dumps({"schema": 1, "error": told}) + "\n")
        sys.stderr.write(f"error: {told['message']}\nhint: {told['hint']}\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
