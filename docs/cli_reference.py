"""Print the command line's reference as Markdown, from the commands themselves: a page of the docs' site.

python docs/cli_reference.py > docs/cli.md
"""

from __future__ import annotations

import typer

from flows.cli import app

_HEAD = """\
# The command line

Every command takes `--help`. With `--json` a command prints one JSON document to standard output and nothing else.
The exit code is 0 when what was asked for was done, 2 for input that is refused, and 1 otherwise.
"""


def main() -> None:
    """Print a heading, the usage and a table of options for each command."""
    print(_HEAD)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        context = typer.Context(command, info_name=f"forgeflow {name}")
        print(f"## forgeflow {name}\n\n{(command.help or '').strip()}\n")
        print(f"    {command.get_usage(context).removeprefix('Usage: ')}\n")
        print("| | |\n|---|---|")
        for parameter in command.params:
            declared, text = parameter.get_help_record(context) or (
                parameter.human_readable_name,
                "",
            )
            declared, text = (part.replace("|", "\\|") for part in (declared, text))
            print(f"| `{declared}` | {text} |")
        print()


if __name__ == "__main__":
    main()
