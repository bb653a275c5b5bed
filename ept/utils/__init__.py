"""What everything rests on: helpful errors, whole files, settings, fingerprints of code."""
