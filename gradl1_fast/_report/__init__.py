"""Reports: one template, one set of charts and one palette for every command that writes a page.

A report is described by :class:`gradl1_fast._report.page.Report`; nothing here knows what was measured.
"""
