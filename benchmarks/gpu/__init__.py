"""What is measured on a GPU only; see README.md here for what is still to be run."""
