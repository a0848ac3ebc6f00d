"""Traces of model runs: the file format, alignment, the error model, verdicts and reports.

Needs numpy alone, so that traces from two machines meet on a third that has neither framework.
"""

from osp_shared.traces.compare import Blame, Comparison, Row, compare
from osp_shared.traces.format import Header, Record, Recorder, Trace, fingerprint, read_trace, write_trace
from osp_shared.traces.ledger import Entry, Result, result

__all__ = [
    "Blame",
    "Comparison",
    "Entry",
    "Header",
    "Record",
    "Recorder",
    "Result",
    "Row",
    "Trace",
    "compare",
    "fingerprint",
    "read_trace",
    "result",
    "write_trace",
]
