"""The command line: `octavo VERB ...`."""
