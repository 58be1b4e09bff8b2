"""One plot of the page that `inspect --html` writes, as an SVG file: for documents.

    python benchmarks/picture.py RUN [RUN ...] --view 1 [--panel 0] --out age.svg

The file carries its colours and its ground, so that it is read on a light and on a dark page. Several RUNs are
compared, in view 15.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.report.compare import compare
from common.report.reading import read_run
from common.report.style import COLOURS, PLOT
from common.report.svg import Drawing, draw
from common.report.views.accuracy import accuracy
from common.report.views.all import questions
from common.report.views.view import Panel

MARGIN = 10.0  # around the drawing, in its units
SCALE = 1.4  # pixels to a unit where nothing else gives the size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory; several for view 15")
    parser.add_argument("--view", type=int, required=True, help="its number, 1 to 15")
    parser.add_argument("--panel", type=int, default=0, help="which of its plots, counted from 0 (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    arguments = parser.parse_args()
    panels = find_panels(arguments.runs, arguments.view)
    if arguments.panel not in range(len(panels)):
        parser.error(f"--view {arguments.view} --panel {arguments.panel} is no plot of {' '.join(arguments.runs)}")
    panel = panels[arguments.panel]
    if panel.plot is None:
        parser.error(panel.sentence)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(picture(draw(panel.plot, f"view {arguments.view}")))
    print(panel.reading)


def find_panels(folders: list[str], number: int) -> tuple[Panel, ...]:
    """The plots of view `number`, none if there is no such view."""
    if len(folders) > 1:
        comparison = compare(folders)
        views = [accuracy(list(zip(comparison.labels, comparison.runs, strict=True)))]
    else:
        views = [view for question in questions(read_run(folders[0])) for view in question.views]
    return next((view.panels for view in views if view.number == number), ())


def picture(drawing: Drawing) -> str:
    """The drawing as a document of its own, without what only a pointer would be told."""
    width, height = drawing.width + 2 * MARGIN, drawing.height + 2 * MARGIN
    box = f'viewBox="{-MARGIN:g} {-MARGIN:g} {width:g} {height:g}"'
    size = f'xmlns="http://www.w3.org/2000/svg" width="{width * SCALE:.0f}" height="{height * SCALE:.0f}"'
    ground = f'<rect x="{-MARGIN:g}" y="{-MARGIN:g}" width="{width:g}" height="{height:g}" rx="6" fill="var(--card)"/>'
    opening, _, inside = re.sub(r"<title>.*?</title>", "", drawing.svg).partition(">")
    opening = re.sub(r'viewBox="[^"]*"', f"{size} {box}", opening)
    return f"{opening}><style>{COLOURS}{PLOT}</style>{ground}{inside}\n"


if __name__ == "__main__":
    main()
