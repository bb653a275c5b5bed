"""The method: a short prompt and a low-rank pair, prompt fusion, gated projection into several spaces."""
