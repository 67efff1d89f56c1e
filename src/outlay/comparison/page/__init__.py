"""The parts of a report: tables, figures, curves, and the files beside the page."""
