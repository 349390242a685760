"""mkdocs hooks: generate the reference from the code, and unlink files that are not part of the site."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import proxbench

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "suite" / "recipe" / "grids" / "grid.schema.json"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    files.append(File.generated(config, "reference/grid-keys.md", content=grid_keys()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files outside docs/ into their paths in the repository."""
    del config, files
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def path_or_link(match: re.Match[str]) -> str:
        words, target = match.group(1), match.group(2)
        path = (folder / target.partition("#")[0]).resolve()
        if "://" in target or (path.is_relative_to(ROOT / "docs") and path.suffix != ".yaml" and not path.is_dir()):
            return match.group(0)
        return f"{words} (`{path.relative_to(ROOT)}` in the repository)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", path_or_link, markdown)


def commands() -> str:
    """The reference of all commands, from their help."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    parts = ["# Commands", "", "`proxbench launch` is `python -m launch`, and so on: see `proxbench --help`."]
    for name, (module, _) in proxbench.MODULES.items():
        if name in proxbench.SINGLE:
            app = typer.Typer(add_completion=False)
            app.command()(proxbench.program(name).main)
        else:
            app = proxbench.program(name).app
        command, typed = get_command(app), f"python -m {module}"
        text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name=typed), name=typed)
        text = re.sub(
            r"^\[bold\](.*)\[/\](  .*)?$", r"    \1\2", text, flags=re.MULTILINE
        )  # an example: a line of a code block
        text = re.sub(r"\[bold\](.*?)\[/\]", r"`\1`", text)
        parts += ["", re.sub(r"^(#+)", r"#\1", text, flags=re.MULTILINE)]
    return "\n".join(parts)


def grid_keys() -> str:
    """The reference of a grid file's keys, from its JSON schema."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    lines = [
        "# Grid keys",
        "",
        "Made from `suite/recipe/grids/grid.schema.json`, from which editors complete grid files.",
        "",
        "## The file",
        "",
        *_table(schema["properties"]),
    ]
    for name, definition in schema["$defs"].items():
        if "properties" in definition:
            said = (definition.get("description") or "").split("\n\n")[0].replace("\n", " ")
            lines += ["", f"## {name}", "", said, "", *_table(definition["properties"])]
    return "\n".join(lines) + "\n"


def _table(properties: dict[str, Any]) -> Iterator[str]:
    yield from ("| key | value | default | |", "| --- | --- | --- | --- |")
    for name, each in properties.items():
        default = f"`{json.dumps(each['default'])}`" if "default" in each else ""
        said = (each.get("description") or "").replace("\n", " ").replace("|", "\\|")
        yield f"| `{name}` | {_kind(each)} | {default} | {said} |"


def _kind(each: dict[str, Any]) -> str:
    """A value's type in words, linked to its section if it has one."""
    if "$ref" in each:
        name = each["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in each:
        return ", ".join(f"`{value}`" for value in each["enum"])
    if "const" in each:
        return f"`{each['const']}`"
    if choices := each.get("anyOf") or each.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(choice) for choice in choices))
    if each.get("type") == "array":
        return f"list of {_kind(each.get('items', {}))}"
    return str(each.get("type", "anything"))
