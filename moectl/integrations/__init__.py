"""Where moectl meets other libraries: importing a module here registers it there; the package alone does nothing."""
