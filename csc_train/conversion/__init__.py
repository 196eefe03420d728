"""Converters: data sets in other shapes become dialogue files, with a report of what could not be mapped."""
