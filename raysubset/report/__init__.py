"""Report a finished run from its directory alone: the page that a user reads, and the files that other tools read.

record = read_report("~/ray_results/digits-1a2b3c4d")     # report.json
for section in sections(record, find_beside(record)): ...
write_files("~/ray_results/digits-1a2b3c4d")              # report/report.html, progress.csv, TensorBoard events

write_files() also takes the directory of a sweep or comparison, whose sections are sweep_sections(record) and
comparison_sections(record). Several runs side by side: several_sections(records), write_several(records, path).
"""

from raysubset.report.beside import Beside, find_beside
from raysubset.report.comparison import advice_sections, comparison_sections
from raysubset.report.files import write_files
from raysubset.report.listing import list_runs, listing_section
from raysubset.report.parts import Command, Section
from raysubset.report.rates import rate_sections, write_rates
from raysubset.report.reading import read_report
from raysubset.report.run import sections
from raysubset.report.several import read_several, several_sections, write_several
from raysubset.report.sweeps import sweep_sections
