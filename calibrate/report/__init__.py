"""What is said of a calibration: in words, as JSON, and as a page."""

from invariclip.calibrate.report.look import require_page_packages
from invariclip.calibrate.report.text import summary_json, summary_text

__all__ = ["require_page_packages", "summary_json", "summary_text"]
