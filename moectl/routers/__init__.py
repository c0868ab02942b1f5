"""Routing algorithms of the literature, one file per family of papers, behind one protocol (`protocol.Router`)."""
