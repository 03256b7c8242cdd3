"""What is said of a calibration: in words, as JSON, and as a page."""

from invariclip.calibrate.report.rendering import require_page_packages
from invariclip.calibrate.report.summary import summary_json, summary_text

__all__ = ["require_page_packages", "summary_json", "summary_text"]
