"""Log-likelihoods of texts, computed by a running engine under any layout."""
