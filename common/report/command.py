"""`run.py inspect`, and the page that `train` leaves: what is printed, and what is written where."""

import json
from collections.abc import Sequence
from pathlib import Path

from common.config import ConfigError
from common.lines import for_terminal
from common.report import as_json, compare, html, text
from common.report.reading import Run, read_run

PAGE = "report.html"  # in a run directory: what `train` writes at its end


def inspect(run_dirs: Sequence[str], page: str | None, is_json: bool) -> str:
    """What to print of one run, or of several beside each other. With `page` a file is written, and named.

    Raises ConfigError as `read_run` and `compare`, and for a `page` that is no file to write.
    """
    if len(run_dirs) == 1:
        run = read_run(run_dirs[0])
        if page is not None:
            return str(_write(Path(page), html.page(run)))
        return _dumped(as_json.to_json(run)) if is_json else for_terminal(text.render(run), text.LABEL)
    comparison = compare.compare(run_dirs)
    if page is not None:
        return str(_write(Path(page), html.comparison_page(comparison)))
    return _dumped(compare.to_json(comparison)) if is_json else compare.render(comparison)


def closing(run_dir: Path, *, with_page: bool) -> str:
    """What `train` ends with: the summary, and where it has written the page, if it has."""
    run = read_run(run_dir)
    page = f"\n{'report':<{text.LABEL}}{write_page(run)}" if with_page else ""
    return for_terminal(f"{text.render(run)}{page}", text.LABEL)


def write_page(run: Run) -> Path:
    """RUN/report.html."""
    return _write(run.folder / PAGE, html.page(run))


def _write(path: Path, content: str) -> Path:
    """`path` has either its old content or all of the new one."""
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else f"has no folder {path.parent} to be in"
        raise ConfigError(f"{path} {wrong}: name an HTML file to write")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
    return path


def _dumped(value: object) -> str:
    return json.dumps(value, indent=1)
