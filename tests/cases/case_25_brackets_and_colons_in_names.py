"""rich's markup and emoji codes in run names: "lr[high]" is shown as "lr" in the table of several runs, ":100:" as an emoji.
Kind: Textualize/rich#2676 #120."""

from common import *
from raysubset.cli.screen import print_sections
from raysubset.report import Section
import contextlib

out = io.StringIO()
with contextlib.redirect_stdout(out):
    print_sections([Section("t", ("", "lr[high]"), (("name", "lr[low]"),))])
check(
    "brackets in cells and headings stay",
    "lr[high]" in out.getvalue() and "lr[low]" in out.getvalue(),
    out.getvalue().split(),
)
