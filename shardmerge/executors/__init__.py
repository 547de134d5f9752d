"""Places to run tasks: ``api`` says what an executor promises, each other file is one."""
