"""nGPT and the GPT baseline, built from the same parallel parts; each parameter declares its named axes."""
