"""How a script begins that runs as on a machine without this package."""

WITHOUT_THE_PACKAGE = """
import sys

class Absent:  # this machine does not have the package
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_encodec":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""
