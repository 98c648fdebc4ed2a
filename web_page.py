"""The frame of a self-contained web page, and how text goes into one."""

import html


def escape(value) -> str:
    """A value as text in which a page sees no markup, within an attribute either."""
    return html.escape(str(value), quote=True)


def web_page(title: str, style: str, body: str) -> str:
    """A page that needs nothing from outside. title: any text; style: CSS; body: what stands in <body>."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}</body>
</html>
"""
