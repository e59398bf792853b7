"""Bridges to other libraries, one file each; the other library is imported only when its bridge is used."""
