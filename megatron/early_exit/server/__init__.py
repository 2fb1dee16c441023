"""Models over HTTP: the APIs of OpenAI and of EE-LLM, a page, metrics."""
