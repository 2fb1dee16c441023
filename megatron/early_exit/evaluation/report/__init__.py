"""One HTML page of result documents, with tables and plots."""
