"""Rewrites README's result tables from the recorded runs: python benchmarks/tables.py [--check]

README holds markers; what stands between them is generated from benchmarks/results/STEM.json:

    <!-- table:STEM:TITLE -->  ...  <!-- /table -->       tables[TITLE] of that file ("claims" for
                               its closing table)

--check changes nothing and fails when README is out of date.
"""

import argparse
import json
import re
import sys

from records import RESULTS, ROOT, format_table, verdict, write_atomically

BLOCK = re.compile(r"(<!-- table:([\w.-]+):([^>]+?) -->\n)(?:(?!<!-- table:).)*?(<!-- /table -->)",
                   re.DOTALL)


def render(stem: str, title: str) -> str:
    """The Markdown of one table of one recorded run, with a line that says where it comes from."""
    path = RESULTS / f"{stem}.json"
    if not path.exists():
        raise SystemExit(f"README.md names {path.relative_to(ROOT)}, which does not exist")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        claims = [{**row, "holds": verdict(row.get("holds"))} for row in run["claims"]]
        tables = {**run["tables"], "claims": claims}
        machine = run["hardware"]["gpu"] or f"{run['hardware']['cores']} CPU cores"
        source = (f"`{run['command']}` ({machine}, torch {run['versions']['torch']}, "
                  f"{run['wall_seconds'] / 60:.0f} min)")
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path.name} is no record of a run: {error!r}") from None
    if title not in tables:
        raise SystemExit(f"{path.name} has no table {title!r}; it has: {', '.join(tables)}")
    return f"{format_table(tables[title])}\n\n{source}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    if not readme.exists():
        sys.exit(f"{readme} does not exist")
    before = readme.read_text(encoding="utf-8")
    blocks = len(BLOCK.findall(before))
    if not blocks == before.count("<!-- table:") == before.count("<!-- /table -->"):
        sys.exit("README.md: each <!-- table:STEM:TITLE --> needs a line of its own and a "
                 "<!-- /table --> before the next")
    after = BLOCK.sub(lambda m: f"{m[1]}{render(m[2], m[3])}{m[4]}", before)
    if args.check:
        stale = "README.md is out of date: run python benchmarks/tables.py"
        sys.exit(stale if after != before else 0)
    write_atomically(readme, after.encode())


if __name__ == "__main__":
    main()
