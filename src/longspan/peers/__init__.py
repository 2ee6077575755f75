"""Other engines and libraries, run beside ours in environments of their own, so that their pins and ours never meet."""
