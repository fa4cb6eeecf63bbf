NAMES = ("operator", "api", "trainer", "dev")
DEFAULT = ("operator", "api", "dev")
def provide(name, only): pass
