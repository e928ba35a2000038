"""Parts of the check on a GPU (`loadtests/gpu`) that call the packages themselves."""
