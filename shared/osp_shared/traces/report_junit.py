"""JUnit XML for CI: a suite a model, a case a layer, so a dashboard shows which layer went wrong and since when."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from osp_shared.traces.ledger import Result
from osp_shared.traces.report_text import number


def junit(results: Sequence[Result]) -> str:
    """The document as text. A layer fails when its error exceeds its bound; structure faults are cases of their own."""
    root = ET.Element("testsuites", name="parity")
    for item in results:
        suite = ET.SubElement(root, "testsuite", name=item.name, time=f"{item.seconds:.2f}")
        rows = item.judged.rows
        failures = 0
        for row in rows:
            case = ET.SubElement(suite, "testcase", classname=f"parity.{item.name}", name=row.title, time="0")
            if row.failed:
                failures += 1
                text = f"relative error {number(row.error.rel_l2)}, bound {number(row.bound.rel_l2)}"
                failure = ET.SubElement(case, "failure", message=text)
                failure.text = f"{number(row.fraction)} of the bound; NaN or infinite: {row.error.nonfinite}"
        faults = [b for b in item.blames if b.why.startswith(("the ", "shape "))]
        if not item.passed and not failures and not faults:
            faults = item.blames[:1]  # the free run alone failed
        for fault in faults:
            case = ET.SubElement(suite, "testcase", classname=f"parity.{item.name}", name=fault.where, time="0")
            ET.SubElement(case, "failure", message=fault.why)
        suite.set("tests", str(len(rows) + len(faults)))
        suite.set("failures", str(failures + len(faults)))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
