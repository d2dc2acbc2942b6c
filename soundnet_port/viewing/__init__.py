"""Pictures and pages: filters, predictions, units, and the web page."""
