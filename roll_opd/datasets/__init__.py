"""From files to prompts: rows and their checks, chat templates, and the resumable order of drawing."""
