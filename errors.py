"""What a user's mistake ends in, and how many of them are said together."""

SHOWN = 20  # of many problems, how many are listed


class InputError(Exception):
    """Something the user gave is wrong. The message is one line that names the place, the fault and the remedy."""


def list_problems(problems: list[str], heading: str = "", remedy: str = "") -> str:
    """One problem in a line; several under a line that says how many, the first SHOWN of them in full."""
    if len(problems) == 1 and not heading:
        return problems[0] + remedy
    listed = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        listed.append(f"  ... and {len(problems) - SHOWN} more")
    return "\n".join([(heading or f"{len(problems)} problems") + remedy, *listed])
