"""The error for user mistakes, and how several are reported at once."""

SHOWN = 20  # problems listed in full


class InputError(Exception):
    """Some user input is wrong. The message is one line: the file or record, what is wrong, what to do."""


def list_names(names: list[str]) -> str:
    """Join the first SHOWN names with commas, and say how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def list_problems(problems: list[str], heading: str = "", remedy: str = "") -> str:
    """Format one problem as one line, several as a heading with their number and a list of the first SHOWN."""
    if len(problems) == 1 and not heading:
        return problems[0] + remedy
    listed = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        listed.append(f"  ... and {len(problems) - SHOWN} more")
    return "\n".join([(heading or f"{len(problems)} problems") + remedy, *listed])
