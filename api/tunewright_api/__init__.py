"""The front end: reads of jobs and models, the OpenAI-compatible gateway to serving pods, progress reports of training pods, and the web page."""
