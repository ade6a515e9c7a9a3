"""The pages that people look at in a browser: report.html, and compare.html for several runs.

A page is one file, made from the templates beside this module. It loads nothing and runs no script.
"""
